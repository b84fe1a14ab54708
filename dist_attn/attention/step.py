"""One step: the local queries against the keys of one rank, as a few kernel calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from dist_attn.attention.accumulate import Rows, RowSum, SoftmaxSum
from dist_attn.attention.staircase import DenseCall
from dist_attn.layout import IntArray
from dist_attn_kernels.segments import Backend, Saved, Segments


@dataclass(frozen=True)
class Kernel:
    """How a step is computed."""

    backend: Backend
    softmax_scale: float
    deterministic: bool = False


@dataclass
class Gradients:
    """Sums of one step's or several steps' gradients."""

    dq: RowSum
    dk: RowSum
    dv: RowSum


class Step(Protocol):
    """The local queries against the keys of one rank."""

    def forward(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        total: SoftmaxSum,
    ) -> None:
        """Add this step's part of the output."""

    def backward(self, kernel: Kernel, saved: Saved, total: Gradients) -> None:
        """Add this step's part of the gradients; `saved` has out and lse over all steps."""


class DenseStep:
    """A step of documents, each seen fully or causally, on dense kernels."""

    def __init__(self, calls: list[DenseCall]) -> None:
        self._calls = [
            (
                Rows(call.q),
                Rows(call.k),
                Segments(_boundaries(call.q), _boundaries(call.k), call.causal),
            )
            for call in calls
        ]

    def forward(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        total: SoftmaxSum,
    ) -> None:
        """See `Step`."""
        for q_rows, k_rows, segments in self._calls:
            out, lse = kernel.backend.forward(
                q_rows.take(q), k_rows.take(k), k_rows.take(v), segments, kernel.softmax_scale
            )
            total.add(q_rows, out, lse)

    def backward(self, kernel: Kernel, saved: Saved, total: Gradients) -> None:
        """See `Step`."""
        for q_rows, k_rows, segments in self._calls:
            part = Saved(
                q_rows.take(saved.dout),
                q_rows.take(saved.q),
                k_rows.take(saved.k),
                k_rows.take(saved.v),
                q_rows.take(saved.out),
                q_rows.take(saved.lse, 1),
            )
            dq, dk, dv = kernel.backend.backward(
                part, segments, kernel.softmax_scale, kernel.deterministic
            )
            total.dq.add(q_rows, dq)
            total.dk.add(k_rows, dk)
            total.dv.add(k_rows, dv)


def _boundaries(intervals: IntArray) -> tuple[int, ...]:
    sizes = intervals[:, 1] - intervals[:, 0]
    return (0, *np.cumsum(sizes).tolist())
