"""Three Gluon operations whose names differ between Triton 3.6 and 3.9, or that 3.6 has no name for."""

from __future__ import annotations

from typing import Any

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@builtin
def reinterpret(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory seen with another dtype, shape or layout."""
    shape = [_unwrap_if_constexpr(s) for s in _unwrap_if_constexpr(shape)]
    dtype, layout = _unwrap_if_constexpr(dtype), _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(memory, dtype, shape, layout)


@builtin
def tma_add(descriptor: Any, coord: Any, source: Any, _semantic: Any = None) -> None:
    """Add a block of shared memory to global memory through TMA, atomically."""
    at = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, at, source.handle)
