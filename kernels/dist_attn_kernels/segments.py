"""Packed segments: the calls that dense kernels carry out, and the interface of a backend.

A call is a list of segments: the i-th segment of the queries attends to the i-th segment of the
keys, fully or causally. Every backend returns `(out, lse)` and takes both back in its backward, so
that a call may be one part of a softmax over more keys: a step of a ring.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


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
    #: What backends have made of these segments, for the next layer.
    kept: dict[Hashable, object] = field(default_factory=dict, repr=False)
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _cuts: dict[tuple[int, int], Segments] = field(default_factory=dict, repr=False)

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
    def shapes(self) -> list[tuple[tuple[int, int], int]]:
        """Queries and keys of each segment, and the scores of one head that count."""
        return [
            ((q, k), q * (k + 1) // 2 if self.causal else q * k)
            for q, k in zip(_sizes(self.cu_q), _sizes(self.cu_k), strict=True)
        ]

    @functools.cached_property
    def num_scores(self) -> int:
        """Scores of one head that count."""
        return sum(scores for _, scores in self.shapes)

    @functools.cached_property
    def has_empty_keys(self) -> bool:
        """Whether some segment has no keys."""
        return 0 in _sizes(self.cu_k)

    def cut(self, first: int, end: int) -> Segments:
        """Return some of the segments as a call of their own, made once."""
        if (first, end) == (0, len(self)):
            return self
        if (first, end) not in self._cuts:
            cu_q, cu_k = self.cu_q[first : end + 1], self.cu_k[first : end + 1]
            self._cuts[first, end] = Segments(
                tuple(b - cu_q[0] for b in cu_q), tuple(b - cu_k[0] for b in cu_k), self.causal
            )
        return self._cuts[first, end]

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
        if len(segments) == 1 and len(q_LHD) and len(k_LKD):
            out, lse = self.forward_one(q_LHD, k_LKD, v_LKD, segments.causal, softmax_scale)
            return out.contiguous(), lse
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
        if len(segments) == 1 and len(saved.q) and len(saved.k):
            with deterministic_kernels(deterministic):
                return self.backward_one(saved, segments.causal, softmax_scale)
        dq, dk, dv = (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (saved.q, saved.k, saved.v)
        )
        with deterministic_kernels(deterministic):
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


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Turn on torch's deterministic kernels inside the block."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # With warn_only the flash backward would warn and go on as it is.
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _sizes(cu: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(cu)]


def bhld(x_LHD: Tensor) -> Tensor:
    """Return a view [1, H, L, D], as torch's kernels take it."""
    return x_LHD.transpose(0, 1)[None]
