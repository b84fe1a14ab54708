"""What each rank of a group has to compute: its queries against every rank's keys.

A workload belongs to a mask, a layout and a rank. It is made once per micro-batch and serves every
layer; the steps are cut when they are first asked for.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from dist_attn.attention.staircase import dense_calls
from dist_attn.attention.step import DenseStep, Step
from dist_attn.attention.tile_step import TileStep
from dist_attn.layout import IntArray, Layout
from dist_attn.masks import DenseForm, Mask, dense_form
from dist_attn.masks.parts import intersect, merge, union_over_rows


class Workload:
    """The steps of one rank, and which rank needs whose keys."""

    def __init__(self, mask: Mask, layout: Layout, cp_rank: int, num_heads: int) -> None:
        self.layout = layout
        self.cp_rank = cp_rank
        self._mask = mask
        self._num_heads = num_heads
        self._form = dense_form(mask, layout.seq_len)

    @functools.cache  # noqa: B019 - the workload outlives its steps by design
    def step(self, source: int) -> Step:
        """Cut the local queries against the keys of rank `source`."""
        return self._step(self._positions(self.cp_rank), self._positions(source))

    @functools.cached_property
    def needs(self) -> np.ndarray:
        """Whether rank r has a query that sees a key of rank s, bool [cp_size, cp_size]."""
        size = self.layout.cp_size
        if self._form is None:
            pieces = self.layout.pieces
            found = [[len(intersect(self.needed(r), p)) > 0 for p in pieces] for r in range(size)]
            return np.array(found)
        needs = np.zeros((size, size), dtype=bool)
        reach = [_reach(self._form, self._positions(r)) for r in range(size)]
        for r, (_, last_query) in enumerate(reach):
            for s, (first_key, _) in enumerate(reach):
                needs[r, s] = (first_key <= last_query).any()
        return needs

    @functools.cache  # noqa: B019
    def needed(self, cp_rank: int) -> IntArray:
        """Stream positions of the keys that queries of `cp_rank` see in any head, as intervals."""
        q = self._positions(cp_rank)
        patterns = {self._mask.pattern(head): head for head in range(self._num_heads)}
        seen = [
            union_over_rows(self._mask.touched(q, q, head), self.layout.seq_len)
            for head in patterns.values()
        ]
        return merge(np.concatenate(seen))

    @functools.cached_property
    def stream(self) -> Step:
        """The whole stream against itself, as one rank with some of the heads computes it."""
        positions = np.arange(self.layout.seq_len)
        return self._step(positions, positions)

    @functools.cache  # noqa: B019
    def stream_order(self, device: torch.device) -> Tensor | None:
        """Index that puts ranks' tokens into stream order; None if they are in it already."""
        return _index(self.layout.stream_order, device)

    @functools.cache  # noqa: B019
    def rank_order(self, device: torch.device) -> Tensor | None:
        """Index that puts the stream into the ranks' order; None if it is in it already."""
        return _index(self.layout.rank_order, device)

    def _step(self, q_positions: IntArray, k_positions: IntArray) -> Step:
        if self._form is None:
            return TileStep(self._mask, q_positions, k_positions)
        return DenseStep(dense_calls(self._form, q_positions, k_positions))

    @functools.cache  # noqa: B019
    def _positions(self, cp_rank: int) -> IntArray:
        return self.layout.positions(cp_rank)


@functools.lru_cache(maxsize=64)
def workload(mask: Mask, layout: Layout, cp_rank: int, num_heads: int) -> Workload:
    """Return the workload of a rank, the same object for the same mask and layout objects."""
    return Workload(mask, layout, cp_rank, num_heads)


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


def _index(order: IntArray, device: torch.device) -> Tensor | None:
    if np.array_equal(order, np.arange(len(order))):
        return None
    return torch.from_numpy(order).to(device)
