"""Local attention over packed segments by the kernels that come with torch.

A call is a list of segments: the i-th segment of the queries attends to the i-th segment of the
keys, fully or causally. Every backend returns `(out, lse)` and takes both back in its backward, so
that a call may be one part of a softmax over more keys: a step of a ring.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dist_attn_kernels import reference

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Segments:
    """Boundaries of the segments of a call, the same number on both sides, without gaps.

    Attributes:
        cu_q: boundaries in the queries, from 0 to their number.
        cu_k: boundaries in the keys. Causal segments are square.
        causal: whether the i-th query of a segment sees only its first i + 1 keys.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    causal: bool
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.cu_q) - 1

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for i in range(len(self)):
            yield slice(*self.cu_q[i : i + 2]), slice(*self.cu_k[i : i + 2])

    @functools.cached_property
    def max_seqlens(self) -> tuple[int, int]:
        """Longest segment of the queries and of the keys."""
        return max(_sizes(self.cu_q), default=0), max(_sizes(self.cu_k), default=0)

    @functools.cached_property
    def min_seqlen(self) -> int:
        """Shortest segment of either side."""
        return min(_sizes(self.cu_q) + _sizes(self.cu_k), default=0)

    def cu_seqlens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Boundaries as int32 tensors on `device`, made once."""
        if device not in self._on_device:
            cu_q = torch.tensor(self.cu_q, dtype=torch.int32, device=device)
            cu_k = torch.tensor(self.cu_k, dtype=torch.int32, device=device)
            self._on_device[device] = (cu_q, cu_k)
        return self._on_device[device]


class Backend(Protocol):
    """Forward and backward of one kernel."""

    name: str

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out [L, H, D] and lse [H, L]; a query without keys gets 0 and -inf."""

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return this call's part of the gradients of q, k and v."""


@dataclass(frozen=True)
class Saved:
    """What a backward takes: the tensors of the forward, with out and lse over all keys."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def segment(self, q: slice, k: slice) -> Saved:
        """Return views of one segment."""
        return Saved(self.dout[q], self.q[q], self.k[k], self.v[k], self.out[q], self.lse[:, q])


class PerSegment:
    """A backend that carries out a call one segment after the other."""

    name = ""

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        out = torch.empty_like(q_LHD, memory_format=torch.contiguous_format)
        lse_dtype = torch.promote_types(q_LHD.dtype, torch.float32)
        lse = q_LHD.new_empty((q_LHD.shape[1], q_LHD.shape[0]), dtype=lse_dtype)
        for q, k in segments:
            if q.start == q.stop:
                continue
            if k.start == k.stop:
                out[q], lse[:, q] = 0, float("-inf")
                continue
            part = self.forward_one(q_LHD[q], k_LKD[k], v_LKD[k], segments.causal, softmax_scale)
            out[q], lse[:, q] = part
        return out, lse

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        dq, dk, dv = (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (saved.q, saved.k, saved.v)
        )
        with _deterministic(deterministic):
            for q, k in segments:
                if q.start == q.stop or k.start == k.stop:
                    dq[q], dk[k], dv[k] = 0, 0, 0
                    continue
                part = self.backward_one(saved.segment(q, k), segments.causal, softmax_scale)
                dq[q], dk[k], dv[k] = part
        return dq, dk, dv

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Forward of one segment, neither side empty."""
        raise AssertionError("a backend defines this")

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward of one segment, neither side empty."""
        raise AssertionError("a backend defines this")


class ReferenceBackend(PerSegment):
    """Plain torch operations: any device and dtype, memory for every score of a segment."""

    name = "reference"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        allowed = _causal(q_LHD) if causal else None
        return reference.attention_forward(q_LHD, k_LKD, v_LKD, allowed, softmax_scale)

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        allowed = _causal(s.q) if causal else None
        return reference.attention_backward(
            s.dout, s.q, s.k, s.v, s.out, s.lse, allowed, softmax_scale
        )


class CpuFlashBackend(PerSegment):
    """`aten._scaled_dot_product_flash_attention_for_cpu`: float32, float64, bfloat16, float16."""

    name = "cpu_flash"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _bhld(q_LHD), _bhld(k_LKD), _bhld(v_LKD), 0.0, causal, scale=softmax_scale
        )
        return out[0].transpose(0, 1), lse[0]

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _bhld(s.dout), _bhld(s.q), _bhld(s.k), _bhld(s.v), _bhld(s.out),
            s.lse[None], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip
        return tuple(g[0].transpose(0, 1) for g in grads)


class CudnnBackend(PerSegment):
    """cuDNN's fused attention, one call per segment: for few and long ones."""

    name = "cudnn"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        result = aten._scaled_dot_product_cudnn_attention(
            _bhld(q_LHD), _bhld(k_LKD), _bhld(v_LKD), None, True, 0.0, causal, False,
            scale=softmax_scale,
        )  # fmt: skip
        # The normaliser comes as [1, H, L, 1] or [1, H, L].
        return result[0][0].transpose(0, 1), result[1].reshape(q_LHD.shape[1], -1)

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        no_dropout = torch.zeros((), dtype=torch.int64, device=s.q.device)
        num_q, num_k = s.q.shape[0], s.k.shape[0]
        # Its backward knows only a row without keys whose normaliser is a finite number.
        lse = s.lse.contiguous()[None, :, :, None]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            _bhld(s.dout), _bhld(s.q), _bhld(s.k), _bhld(s.v), _bhld(s.out),
            lse, no_dropout, no_dropout, None, None, None, num_q, num_k, 0.0, causal,
            scale=softmax_scale,
        )  # fmt: skip
        return tuple(g[0].transpose(0, 1) for g in grads)


class FlashBackend:
    """`aten._flash_attention_forward` over packed segments: FA2, or what torch has put under it."""

    name = "flash"

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if q_LHD.shape[0] == 0 or k_LKD.shape[0] == 0:
            return _nothing_to_see(q_LHD)
        dim = q_LHD.shape[-1]
        q, k, v = (_pad_dim(x) for x in (q_LHD, k_LKD, v_LKD))
        cu_q, cu_k = segments.cu_seqlens(q.device)
        max_q, max_k = segments.max_seqlens
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, segments.causal, False, scale=softmax_scale
        )
        # It marks queries without keys by +inf.
        return out[..., :dim], lse.masked_fill(torch.isposinf(lse), float("-inf"))

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        s = saved
        if s.q.shape[0] == 0 or s.k.shape[0] == 0:
            return torch.zeros_like(s.q), torch.zeros_like(s.k), torch.zeros_like(s.v)
        dim = s.q.shape[-1]
        dout, q, k, v, out = (_pad_dim(x) for x in (s.dout, s.q, s.k, s.v, s.out))
        cu_q, cu_k = segments.cu_seqlens(q.device)
        max_q, max_k = segments.max_seqlens
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with _deterministic(deterministic):
            grads = aten._flash_attention_backward(
                dout.contiguous(), q, k, v, out.contiguous(), s.lse.contiguous(), cu_q, cu_k,
                max_q, max_k, 0.0, segments.causal, rng, rng, scale=softmax_scale,
            )  # fmt: skip
        return tuple(g[..., :dim] for g in grads)


class CudaBackend:
    """cuDNN for calls of few and long segments, packed flash attention for the rest."""

    name = "cuda"
    #: Below this length, or beyond this number of segments, one packed call is faster.
    min_cudnn_tokens = 1024
    max_cudnn_segments = 4

    def __init__(self, cudnn_refusal: str | None) -> None:
        self.cudnn_refusal = cudnn_refusal
        self.cudnn, self.flash = CudnnBackend(), FlashBackend()

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        backend = self._choose(segments, False)
        return backend.forward(q_LHD, k_LKD, v_LKD, segments, softmax_scale)

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        backend = self._choose(segments, deterministic)
        return backend.backward(saved, segments, softmax_scale, deterministic)

    def _choose(self, segments: Segments, deterministic: bool) -> Backend:
        long = segments.min_seqlen >= self.min_cudnn_tokens
        few = len(segments) <= self.max_cudnn_segments
        use_cudnn = long and few and not deterministic and self.cudnn_refusal is None
        return self.cudnn if use_cudnn else self.flash


@dataclass(frozen=True)
class Choice:
    """The backend for a kind of tensors, and why each other one was refused."""

    backend: Backend
    refused: dict[str, str]


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """Choose the dense backend of a device and dtype; the answer is kept.

    Raises:
        ValueError: the dtype is no floating type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"attention takes floating-point tensors, got {dtype}")
    refused: dict[str, str] = {}
    table: list[tuple[str, Callable[[], str | None], Callable[[], Backend]]] = [
        ("cuda", lambda: _refuse_flash(device, dtype, head_dim),
         lambda: CudaBackend(_refuse_cudnn(device, head_dim))),
        ("cpu_flash", lambda: _refuse_cpu_flash(device, dtype), CpuFlashBackend),
    ]  # fmt: skip
    for name, refuse, make in table:
        reason = refuse()
        if reason is None:
            return Choice(make(), refused)
        refused[name] = reason
    return Choice(ReferenceBackend(), refused)


def _refuse_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if head_dim > 256:
        return f"takes head dimensions up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def _refuse_cudnn(device: torch.device, head_dim: int) -> str | None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "pays from compute capability 9.0"
    if head_dim > 128 or head_dim % 8:
        return f"takes head dimensions up to 128 in eights, not {head_dim}"
    if not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    return None


def _refuse_cpu_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"does not take {dtype}"
    return None


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Turn on torch's deterministic kernels inside the block."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _sizes(cu: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(cu)]


def _bhld(x_LHD: Tensor) -> Tensor:
    return x_LHD.transpose(0, 1)[None]


def _pad_dim(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _nothing_to_see(q_LHD: Tensor) -> tuple[Tensor, Tensor]:
    lse = q_LHD.new_full((q_LHD.shape[1], q_LHD.shape[0]), float("-inf"), dtype=torch.float32)
    return torch.zeros_like(q_LHD), lse


def _causal(q_LHD: Tensor) -> Tensor:
    return torch.ones(len(q_LHD), len(q_LHD), dtype=torch.bool, device=q_LHD.device).tril()
