"""Block-sparse attention over packed tokens, with a backward that takes a foreign out and lse.

The tables of `lists.py` say which tiles count. On Hopper the kernels of `block_sparse_hopper*.py`
run; everywhere else, and for what those do not cover, the Triton kernels of
`block_sparse_triton.py`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from dist_attn_kernels import block_sparse_triton as plain
from dist_attn_kernels.lists import BLOCK, BlockLists, num_blocks

Backend = Literal["auto", "triton", "hopper"]
HEAD_DIMS = range(16, 257, 8)


@dataclass(frozen=True)
class _Call:
    """What the checked arguments of one call come to."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    hopper: bool

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.heads // self.kv_heads


def block_sparse_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lists: BlockLists,
    *,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the listed tiles, differentiable in q, k and v, through out and through lse.

    Args:
        q_THD: [queries, heads, head_dim], float16, bfloat16 or (Triton only) float32.
        k_TKD: [keys, kv_heads, head_dim]; heads are a multiple of kv_heads.
        v_TKD: like k_TKD.
        lists: from `build_lists`, for these lengths, on the same device.
        softmax_scale: by default head_dim ** -0.5.
        backend: "auto" takes the Hopper kernels where they apply (see `why_not_hopper`).

    Returns:
        out like q_THD, and lse float32 [heads, queries], natural log. A query without keys has
        out 0 and lse -inf.

    Numerics: float32 accumulation in a fixed order; results and gradients repeat bit by bit.
    """
    options = (softmax_scale, backend)
    out, lse = _BlockSparse.apply(q_THD, k_TKD, v_TKD, lists, options)
    return out, lse


def block_sparse_forward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lists: BlockLists,
    *,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The forward alone; arguments and results as `block_sparse_attention`, no gradients."""
    call = _checked((q_THD, k_TKD, v_TKD), lists, softmax_scale, backend)
    out = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    lse = torch.empty(call.heads, lists.q_len, dtype=torch.float32, device=q_THD.device)
    if lists.has_empty_rows:
        out.zero_()
        lse.fill_(-math.inf)
    if lists.rows.shape[0]:
        with torch.cuda.device_of(q_THD):
            if call.hopper:
                from dist_attn_kernels import block_sparse_hopper  # noqa: PLC0415

                block_sparse_hopper.forward((q_THD, k_TKD, v_TKD), (out, lse), lists, call.scale)
            else:
                _triton_forward((q_THD, k_TKD, v_TKD), (out, lse), lists, call)
    return out, lse


def block_sparse_backward(
    dout_THD: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out_THD: Tensor,
    lse_HT: Tensor,
    lists: BlockLists,
    *,
    dlse_HT: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for a given out and lse.

    `out_THD` and `lse_HT` may come from elsewhere: in a ring they are those of all keys, and the
    probabilities here are exp(score - lse), a part of the whole softmax.

    Numerics: float32 accumulation in a fixed order; gradients repeat bit by bit.
    """
    call = _checked(qkv, lists, softmax_scale, backend)
    q, k, v = qkv
    if dout_THD.shape != q.shape or out_THD.shape != q.shape:
        raise ValueError(
            f"out and its gradient must be like q {list(q.shape)}, got {list(out_THD.shape)} and "
            f"{list(dout_THD.shape)}"
        )
    if lse_HT.shape != (call.heads, lists.q_len) or lse_HT.dtype != torch.float32:
        raise ValueError(
            f"lse must be float32 [{call.heads}, {lists.q_len}], "
            f"got {lse_HT.dtype} {list(lse_HT.shape)}"
        )
    if not _rows_contiguous(dout_THD) or not _aligned(dout_THD):
        dout_THD = dout_THD.clone(memory_format=torch.contiguous_format)
    if not _rows_contiguous(out_THD):
        out_THD = out_THD.contiguous()
    lse = lse_HT.contiguous()
    make = torch.zeros_like if lists.has_empty_cols else torch.empty_like
    dk = make(k, memory_format=torch.contiguous_format)
    dv = make(v, memory_format=torch.contiguous_format)
    make = torch.zeros_like if lists.has_empty_rows else torch.empty_like
    dq = make(q, memory_format=torch.contiguous_format)
    if not lists.rows.shape[0]:
        return dq, dk, dv
    with torch.cuda.device_of(q):
        tensors = (q, k, v, dout_THD, lse, _delta(out_THD, dout_THD, dlse_HT))
        if call.hopper:
            _hopper_backward(tensors, (dq, dk, dv), lists, call)
        else:
            _triton_backward(tensors, (dq, dk, dv), lists, call)
    return dq, dk, dv


def why_not_hopper(q: Tensor) -> str | None:
    """The reason why the Hopper kernels cannot take this call, or None."""
    if q.device.type != "cuda" or _generation(q.device.index or 0) != 9:
        return "they need a GPU of compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"they take float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"they take head dims 64 and 128, not {q.shape[-1]}"
    return None


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, options: Any) -> Any:
        scale, backend = options
        out, lse = block_sparse_forward(q, k, v, lists, softmax_scale=scale, backend=backend)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists, ctx.options = lists, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        scale, backend = ctx.options
        grads = block_sparse_backward(
            torch.zeros_like(out) if dout is None else dout,
            (q, k, v),
            out,
            lse,
            ctx.lists,
            dlse_HT=dlse,
            softmax_scale=scale,
            backend=backend,
        )
        return *grads, None, None


def _rows_contiguous(t: Tensor) -> bool:
    return t.stride(2) == 1 and t.stride(1) == t.shape[2] and t.stride(0) % 8 == 0


def _aligned(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0


def _checked(
    qkv: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    softmax_scale: float | None,
    backend: Backend,
) -> _Call:
    q, k, v = qkv
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k, v must be [tokens, heads, head_dim] with one head_dim, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k, v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if heads % kv_heads or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"heads must be a multiple of kv_heads and head_dim one of 16, 24, ..., 256; "
            f"got {heads}, {kv_heads} and {head_dim}"
        )
    if q.shape[0] != lists.q_len or k.shape[0] != lists.k_len:
        raise ValueError(
            f"the lists are for {lists.q_len} queries and {lists.k_len} keys, "
            f"got {q.shape[0]} and {k.shape[0]}"
        )
    per_query_head = lists.num_mask_heads == heads and lists.num_mask_kv_heads == kv_heads
    if not per_query_head and not (
        lists.num_mask_heads == lists.num_mask_kv_heads and lists.num_mask_heads in (1, kv_heads)
    ):
        raise ValueError(
            f"lists with {lists.num_mask_heads} mask heads on {lists.num_mask_kv_heads} key/value "
            f"heads do not fit {heads} heads on {kv_heads}; build them with 1, {kv_heads} or "
            f"{heads} mask heads, the last with heads_per_kv={heads // kv_heads}"
        )
    for name, t in zip("qkv", qkv, strict=True):
        if not _rows_contiguous(t):
            raise ValueError(
                f"{name} must be contiguous inside a token and have a token stride that is a "
                f"multiple of 8, got strides {t.stride()}; call .contiguous()"
            )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {scale}")
    reason = "backend 'triton' was asked for" if backend == "triton" else why_not_hopper(q)
    if reason is None and not all(map(_aligned, qkv)):
        reason = "they take tensors that start at a multiple of 16 bytes"
    if backend == "hopper" and reason is not None:
        raise ValueError(f"the Hopper kernels cannot take this call: {reason}; use backend 'auto'")
    return _Call(heads, kv_heads, head_dim, scale, reason is None)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _common(lists: BlockLists, call: _Call, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "GROUP": call.group,
        "D": call.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(call.head_dim)),
        "PAIRS": lists.num_intervals,
        "HAS_BITS": lists.bits is not None,
        "PRECISION": _precision(dtype),
    }


def _interval_stride(lists: BlockLists) -> int:
    return lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0


@functools.lru_cache(maxsize=64)
def _generation(index: int) -> int:
    """Major compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)[0]


@functools.lru_cache(maxsize=64)
def _shared_memory(index: int) -> int:
    """Bytes of shared memory that one program can have on a CUDA device."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _row_bytes(call: _Call, dtype: torch.dtype) -> int:
    """Bytes of a token of one head, as the Triton kernels hold it."""
    return triton.next_power_of_2(call.head_dim) * dtype.itemsize


def _launch(call: _Call, q: Tensor, kind: str) -> dict[str, int]:
    """Warps and pipeline depth."""
    if q.device.type != "cuda":
        return {"num_warps": 4, "num_stages": 1}
    stages = plain.pipeline_stages(
        _row_bytes(call, q.dtype), kind, _shared_memory(q.device.index or 0)
    )
    return {"num_warps": 8, "num_stages": 1 if q.dtype == torch.float32 else stages}


def _triton_forward(
    qkv: tuple[Tensor, ...], results: tuple[Tensor, Tensor], lists: BlockLists, call: _Call
) -> None:
    q, k, v = qkv
    out, lse = results
    grid = (lists.rows.shape[0] * (call.heads // lists.num_mask_heads),)
    plain.forward_kernel[grid](
        q, k, v, out, lse,
        lists.rows, lists.row_blocks, lists.row_kinds, lists.intervals, _bits(lists),
        lists.q_len, lists.k_len, call.scale * math.log2(math.e),
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), _interval_stride(lists),
        HEADS=call.heads, MASK_HEADS=lists.num_mask_heads,
        PER_STEP=1 if _row_bytes(call, q.dtype) > plain.NARROW_ROW_BYTES else 2,
        **_common(lists, call, q.dtype), **_launch(call, q, "forward"),
    )  # fmt: skip


def _triton_backward(
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    call: _Call,
) -> None:
    q, k, v, dout, lse, delta = tensors
    dq, dk, dv = grads
    grid = (lists.rows.shape[0] * (call.heads // lists.num_mask_heads),)
    common = _common(lists, call, q.dtype)
    plain.dq_kernel[grid](
        q, k, v, dout, lse, delta, dq,
        lists.rows, lists.row_blocks, lists.row_kinds, lists.intervals, _bits(lists),
        lists.q_len, lists.k_len, call.scale,
        q.stride(0), k.stride(0), v.stride(0), dout.stride(0), dq.stride(0),
        _interval_stride(lists),
        HEADS=call.heads, MASK_HEADS=lists.num_mask_heads, PER_STEP=1,
        **common, **_launch(call, q, "backward"),
    )  # fmt: skip
    per_query_head = lists.num_mask_heads != lists.num_mask_kv_heads
    grid = (lists.cols.shape[0] * (call.kv_heads // lists.num_mask_kv_heads),)
    plain.dkv_kernel[grid](
        q, k, v, dout, lse, delta, dk, dv,
        lists.cols, lists.col_entries, lists.col_kinds, lists.intervals, _bits(lists),
        lists.q_len, lists.k_len, call.scale,
        q.stride(0), k.stride(0), v.stride(0), dout.stride(0), dk.stride(0), dv.stride(0),
        _interval_stride(lists),
        KV_HEADS=call.kv_heads, MASK_KV_HEADS=lists.num_mask_kv_heads,
        HEADS_PER_MASK=call.heads // lists.num_mask_heads,
        LOOP=1 if per_query_head else call.group,
        **common, **_launch(call, q, "backward"),
    )  # fmt: skip


def _hopper_backward(
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    call: _Call,
) -> None:
    from dist_attn_kernels import block_sparse_hopper_dkv, block_sparse_hopper_dq  # noqa: PLC0415

    q, k, v, dout, lse, delta = tensors
    dq, dk, dv = grads
    pad = num_blocks(lists.q_len) * BLOCK
    stats = torch.empty(2, call.heads, pad, dtype=torch.float32, device=q.device)
    rows = 256
    plain.pad_kernel[(triton.cdiv(pad, rows), call.heads)](
        lse, delta, stats[0], stats[1], lists.q_len, pad, ROWS=rows
    )
    tensors = (q, k, v, dout, stats[0], stats[1])
    block_sparse_hopper_dkv.key_gradients(tensors, dk, dv, lists, call.scale)
    block_sparse_hopper_dq.query_gradient(tensors, dq, lists, call.scale)


def _bits(lists: BlockLists) -> Tensor:
    return lists.intervals if lists.bits is None else lists.bits


def _delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    tokens, heads, head_dim = out.shape
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    if tokens:
        rows = BLOCK
        plain.delta_kernel[(triton.cdiv(tokens, rows), heads)](
            out, dout, delta if dlse is None else dlse.contiguous(), delta,
            tokens, out.stride(0), dout.stride(0),
            D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
            HAS_DLSE=dlse is not None, ROWS=rows,
        )  # fmt: skip
    return delta
