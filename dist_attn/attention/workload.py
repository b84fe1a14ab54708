"""What each rank of a group has to compute: its queries against every rank's keys.

A workload belongs to a mask, a layout and a rank. It is made once per micro-batch and serves every
layer; the steps are cut when they are first asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from dist_attn_kernels.dense import Backend, Saved, Segments
from torch import Tensor

from dist_attn.attention.accumulate import Rows, RowSum, SoftmaxSum
from dist_attn.attention.staircase import DenseCall, dense_calls
from dist_attn.errors import PlanError
from dist_attn.layout import IntArray, Layout
from dist_attn.masks import DenseForm, Mask, dense_form


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


class Step:
    """The local queries against the keys of one rank."""

    def __init__(self, calls: list[DenseCall]) -> None:
        self._calls = [
            (
                Rows(call.q),
                Rows(call.k),
                Segments(_boundaries(call.q), _boundaries(call.k), call.causal),
            )
            for call in calls
        ]

    def __bool__(self) -> bool:
        return bool(self._calls)

    def forward(self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, total: SoftmaxSum) -> None:
        """Add this step's part of the output."""
        for q_rows, k_rows, segments in self._calls:
            out, lse = kernel.backend.forward(
                q_rows.take(q), k_rows.take(k), k_rows.take(v), segments, kernel.softmax_scale
            )
            total.add(q_rows, out, lse)

    def backward(self, kernel: Kernel, saved: Saved, total: Gradients) -> None:
        """Add this step's part of the gradients; `saved` has out and lse over all steps."""
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


class Workload:
    """The steps of one rank, and which rank needs whose keys."""

    def __init__(self, mask: Mask, layout: Layout, cp_rank: int) -> None:
        form = dense_form(mask, layout.seq_len)
        if form is None:
            raise PlanError(
                f"no kernel for the mask {mask!r}: the dense kernels take Full, Causal, Documents "
                f"and their `&`"
            )
        self.layout = layout
        self.cp_rank = cp_rank
        self._form = form

    @functools.cache  # noqa: B019 - the workload outlives its steps by design
    def step(self, source: int) -> Step:
        """Cut the local queries against the keys of rank `source`."""
        q_positions, k_positions = self._positions(self.cp_rank), self._positions(source)
        return Step(dense_calls(self._form, q_positions, k_positions))

    @functools.cached_property
    def needs(self) -> np.ndarray:
        """Whether rank r has a query that sees a key of rank s, bool [cp_size, cp_size]."""
        reach = [_reach(self._form, self._positions(r)) for r in range(self.layout.cp_size)]
        needs = np.zeros((self.layout.cp_size, self.layout.cp_size), dtype=bool)
        for r, (_, last_query) in enumerate(reach):
            for s, (first_key, _) in enumerate(reach):
                needs[r, s] = (first_key <= last_query).any()
        return needs

    @functools.cached_property
    def stream(self) -> Step:
        """The whole stream against itself, as one rank with some of the heads computes it."""
        positions = np.arange(self.layout.seq_len)
        return Step(dense_calls(self._form, positions, positions))

    @functools.cache  # noqa: B019
    def stream_order(self, device: torch.device) -> Tensor | None:
        """Index that puts ranks' tokens into stream order; None if they are in it already."""
        return _index(self.layout.stream_order, device)

    @functools.cache  # noqa: B019
    def rank_order(self, device: torch.device) -> Tensor | None:
        """Index that puts the stream into the ranks' order; None if it is in it already."""
        return _index(self.layout.rank_order, device)

    @functools.cache  # noqa: B019
    def _positions(self, cp_rank: int) -> IntArray:
        return self.layout.positions(cp_rank)


@functools.lru_cache(maxsize=64)
def workload(mask: Mask, layout: Layout, cp_rank: int) -> Workload:
    """Return the workload of a rank, the same object for the same mask and layout objects."""
    return Workload(mask, layout, cp_rank)


def _reach(form: DenseForm, positions: IntArray) -> tuple[IntArray, IntArray]:
    """Per document the first key held and the last key that a held query sees.

    Documents without tokens here are out of reach of everything.
    """
    bounds = np.searchsorted(positions, form.cu_seqlens)
    held = np.diff(bounds) > 0
    first = np.full(len(held), np.iinfo(np.int64).max)
    last = np.full(len(held), -1)
    first[held] = positions[bounds[:-1][held]]
    last[held] = positions[bounds[1:][held] - 1] if form.causal else form.cu_seqlens[1:][held] - 1
    return first, last


def _boundaries(intervals: IntArray) -> tuple[int, ...]:
    sizes = intervals[:, 1] - intervals[:, 0]
    return (0, *np.cumsum(sizes).tolist())


def _index(order: IntArray, device: torch.device) -> Tensor | None:
    if np.array_equal(order, np.arange(len(order))):
        return None
    return torch.from_numpy(order).to(device)
