"""The interface of flash-attn on the kernels at hand, so that peers run their own code anywhere.

Peers import `flash_attn` for the attention of one block on one device. Where that package cannot be
had (no GPU, or another build), this module stands in for it while they are imported: the kernels
are then those that every strategy here uses, and what is compared is the peers' own exchange and
merging. Windows, and causal blocks that are not square, are written out.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_attn_kernels import reference
from dist_attn_kernels.dense import choose_backend
from dist_attn_kernels.segments import Saved, Segments

Window = tuple[int, int]


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Answer `import flash_attn` from here, unless the package is installed."""
    with contextlib.suppress(ImportError):
        import flash_attn  # noqa: F401

        yield
        return
    package, interface = (
        types.ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface")
    )
    for module in (package, interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    package.__version__ = "2.8.0"  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    package.flash_attn_func = None  # type: ignore[attr-defined]
    for function in (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    ):
        setattr(interface, function.__name__, function)
    sys.modules.update({m.__name__: m for m in (package, interface)})
    try:
        yield
    finally:
        for module in (package, interface):
            del sys.modules[module.__name__]


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    window = (window_size_left, window_size_right)
    parts = [
        _forward(*x, _whole(x[0], x[1], causal), softmax_scale, window)
        for x in zip(q, k, v, strict=True)
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.stack(outs), torch.stack(lses), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    window = (window_size_left, window_size_right)
    tensors = (dout, q, k, v, out, softmax_lse)
    for i, one in enumerate(zip(*tensors, strict=True)):
        saved = Saved(*one)
        grads = _backward(saved, _whole(saved.q, saved.k, causal), softmax_scale, window)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target[i].copy_(grad)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    segments = _segments(cu_seqlens_q, cu_seqlens_k, causal)
    window = (window_size_left, window_size_right)
    return *_forward(q, k, v, segments, softmax_scale, window), None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    segments = _segments(cu_seqlens_q, cu_seqlens_k, causal)
    saved = Saved(dout, q, k, v, out, softmax_lse)
    window = (window_size_left, window_size_right)
    grads = _backward(saved, segments, softmax_scale, window)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        target.copy_(grad)


def _whole(q: Tensor, k: Tensor, causal: bool) -> Segments:
    return Segments((0, len(q)), (0, len(k)), causal)


def _segments(cu_q: Tensor, cu_k: Tensor, causal: bool) -> Segments:
    return Segments(tuple(cu_q.tolist()), tuple(cu_k.tolist()), causal)


def _is_dense(segments: Segments, window: Window) -> bool:
    return window == (-1, -1) and (not segments.causal or segments.cu_q == segments.cu_k)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    if _is_dense(segments, window):
        backend = choose_backend(q.device, q.dtype, q.shape[-1]).backend
        q, k, v = (x.contiguous() for x in (q, k, v))
        return backend.forward(q, k, v, segments, scale)
    out, lse = torch.empty_like(q), q.new_empty((q.shape[1], len(q)), dtype=torch.float32)
    for rows, keys in segments:
        allowed = _allowed(rows, keys, segments.causal, window, q.device)
        out[rows], lse[:, rows] = reference.attention_forward(
            q[rows], k[keys], v[keys], allowed, scale
        )
    return out, lse


def _backward(saved: Saved, segments: Segments, scale: float, window: Window) -> list[Tensor]:
    if _is_dense(segments, window):
        backend = choose_backend(saved.q.device, saved.q.dtype, saved.q.shape[-1]).backend
        tensors = (saved.dout, saved.q, saved.k, saved.v, saved.out, saved.lse)
        whole = Saved(*(x.contiguous() for x in tensors))
        return list(backend.backward(whole, segments, scale, False))
    grads = [torch.zeros_like(x) for x in (saved.q, saved.k, saved.v)]
    for rows, keys in segments:
        one = saved.segment(rows, keys)
        allowed = _allowed(rows, keys, segments.causal, window, saved.q.device)
        parts = reference.attention_backward(
            one.dout, one.q, one.k, one.v, one.out, one.lse, allowed, scale
        )
        for grad, part, where in zip(grads, parts, (rows, keys, keys), strict=True):
            grad[where] = part
    return grads


def _allowed(
    rows: slice, keys: slice, causal: bool, window: Window, device: torch.device
) -> Tensor:
    """As flash-attn defines it: the last query stands beside the last key."""
    num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
    q = torch.arange(num_q, device=device)[:, None] + num_k - num_q
    k = torch.arange(num_k, device=device)[None]
    left, right = window
    right = 0 if causal else right
    allowed = torch.ones((num_q, num_k), dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= k >= q - left
    if right >= 0:
        allowed &= k <= q + right
    return allowed
