"""The Gluon operations whose names differ between Triton 3.6 and 3.9."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

_RENAMED = hasattr(tma, "async_load")
tma_load = tma.async_load if _RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if _RENAMED else tma.async_copy_shared_to_global


@builtin
def reinterpret(memory: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory seen with another dtype, shape or layout."""
    shape = [_unwrap_if_constexpr(s) for s in _unwrap_if_constexpr(shape)]
    dtype, layout = _unwrap_if_constexpr(dtype), _unwrap_if_constexpr(layout)
    return _semantic.memdesc_reinterpret(memory, dtype, shape, layout)
