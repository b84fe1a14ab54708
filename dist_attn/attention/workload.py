"""What each rank of a group has to compute: its queries against every rank's keys.

A workload belongs to a mask, a layout, a rank and some heads. It is made once per micro-batch and
serves every layer; what it is asked for is worked out when it is first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_attn.attention.accumulate import Rows
from dist_attn.attention.staircase import dense_calls
from dist_attn.attention.step import DenseStep, Step
from dist_attn.attention.tile_step import TileStep
from dist_attn.layout import IntArray, Layout, expand, from_intervals
from dist_attn.masks import DenseForm, Mask, dense_form
from dist_attn.masks.parts import intersect, merge, union_over_rows


@dataclass(frozen=True)
class HeadClass:
    """Key/value heads of which the same keys are needed, and the query heads that read them."""

    q_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Fetch:
    """The keys of one rank that another one needs.

    Attributes:
        rows: their places among the tokens of the rank that holds them.
        positions: int64 their stream positions.
    """

    rows: Rows
    positions: IntArray


class Workload:
    """The steps of one rank, and which rank needs whose keys.

    Args:
        mask: the mask.
        layout: which rank holds which tokens.
        cp_rank: the rank whose queries are computed.
        heads: the mask's number of each query head.
        num_kv_heads: key/value heads that these read, in groups of equal size.
    """

    def __init__(
        self, mask: Mask, layout: Layout, cp_rank: int, heads: tuple[int, ...], num_kv_heads: int
    ) -> None:
        mask.check(layout.seq_len)
        self.mask = mask
        self.layout = layout
        self.cp_rank = cp_rank
        self.heads = heads
        self.num_kv_heads = num_kv_heads
        self._form = dense_form(mask, layout.seq_len)
        self._positions: dict[int, IntArray] = {}
        self._steps: dict[tuple[int, int], Step] = {}
        self._needed: dict[tuple[int, int], IntArray] = {}
        self._fetches: dict[tuple[int, int, int], Fetch] = {}
        self._node_layouts: dict[int, Layout] = {}
        self._orders: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    def positions(self, cp_rank: int) -> IntArray:
        """Stream positions of a rank's tokens."""
        if cp_rank not in self._positions:
            self._positions[cp_rank] = self.layout.positions(cp_rank)
        return self._positions[cp_rank]

    def step(self, source: int) -> Step:
        """Cut the local queries against all keys of rank `source`."""
        if (source, -1) not in self._steps:
            self._steps[source, -1] = self._step(self.positions(source), self.heads)
        return self._steps[source, -1]

    def fetched_step(self, source: int, head_class: int) -> Step:
        """Cut the local queries against the keys fetched from rank `source` for a head class."""
        if (source, head_class) not in self._steps:
            heads = tuple(self.heads[h] for h in self.head_classes[head_class].q_heads)
            own = source == self.cp_rank
            positions = (
                self.positions(source)
                if own
                else self.fetch(self.cp_rank, source, head_class).positions
            )
            self._steps[source, head_class] = self._step(positions, heads)
        return self._steps[source, head_class]

    def half_heads(self, half: int) -> tuple[slice, slice]:
        """Return the query heads and the key/value heads of one half, by their place here."""
        repeats = len(self.heads) // self.num_kv_heads
        bounds = (0, self.num_kv_heads // 2, self.num_kv_heads)
        first, end = bounds[half : half + 2]
        return slice(first * repeats, end * repeats), slice(first, end)

    def half_step(self, half: int) -> Step:
        """Cut the local queries against the own keys, for one half of the heads."""
        if self._form is not None:
            return self.step(self.cp_rank)  # dense kernels take any heads
        key = (self.cp_rank, -2 - half)
        if key not in self._steps:
            heads = self.heads[self.half_heads(half)[0]]
            self._steps[key] = self._step(self.positions(self.cp_rank), heads)
        return self._steps[key]

    @functools.cached_property
    def expected_scores(self) -> int:
        """Scores of these heads over the whole stream; sparse masks count as one in eight."""
        if self._form is None:
            return len(self.heads) * self.layout.seq_len**2 // 8
        squares = int((np.diff(self._form.cu_seqlens).astype(np.int64) ** 2).sum())
        return len(self.heads) * squares // (2 if self._form.causal else 1)

    @functools.cached_property
    def needs(self) -> np.ndarray:
        """Whether rank r has a query that sees a key of rank s, bool [cp_size, cp_size]."""
        size = self.layout.cp_size
        needs = np.zeros((size, size), dtype=bool)
        if self._form is not None:
            reach = [_reach(self._form, self.positions(r)) for r in range(size)]
            for r, (_, last_query) in enumerate(reach):
                for s, (first_key, _) in enumerate(reach):
                    needs[r, s] = (first_key <= last_query).any()
            return needs
        for r in range(size):
            for c in range(len(self.head_classes)):
                needs[r] |= [len(intersect(self.needed(r, c), p)) > 0 for p in self.layout.pieces]
        return needs

    @functools.cached_property
    def head_classes(self) -> tuple[HeadClass, ...]:
        """Key/value heads grouped by the patterns of the query heads that read them."""
        repeats = len(self.heads) // max(self.num_kv_heads, 1)
        classes: dict[frozenset[Hashable], list[int]] = {}
        for kv_head in range(self.num_kv_heads):
            readers = self.heads[kv_head * repeats : (kv_head + 1) * repeats]
            dense = self._form is not None
            patterns = frozenset() if dense else frozenset(map(self.mask.pattern, readers))
            classes.setdefault(patterns, []).append(kv_head)
        return tuple(
            HeadClass(tuple(h * repeats + i for h in kv for i in range(repeats)), tuple(kv))
            for kv in classes.values()
        )

    def needed(self, cp_rank: int, head_class: int) -> IntArray:
        """Stream positions of the keys that queries of `cp_rank` see, as ascending intervals."""
        if (cp_rank, head_class) not in self._needed:
            q = self.positions(cp_rank)
            heads = [self.heads[h] for h in self.head_classes[head_class].q_heads]
            patterns = {self.mask.pattern(head): head for head in heads}
            seen = [
                union_over_rows(self.mask.touched(q, q, head), self.layout.seq_len)
                for head in patterns.values()
            ]
            self._needed[cp_rank, head_class] = merge(np.concatenate(seen))
        return self._needed[cp_rank, head_class]

    def fetch(self, needing: int, holding: int, head_class: int) -> Fetch:
        """Return the keys of rank `holding` that rank `needing` needs."""
        key = (needing, holding, head_class)
        if key not in self._fetches:
            pieces = self.layout.pieces[holding]
            found = intersect(self.needed(needing, head_class), pieces)
            rows = np.searchsorted(self.positions(holding), found)
            self._fetches[key] = Fetch(Rows(rows), expand(found))
        return self._fetches[key]

    def node_layout(self, inner_size: int) -> Layout:
        """Return the layout in which each `inner_size` ranks in sequence are one."""
        if inner_size not in self._node_layouts:
            pieces = self.layout.pieces
            nodes = [
                np.concatenate(pieces[i : i + inner_size])
                for i in range(0, len(pieces), inner_size)
            ]
            self._node_layouts[inner_size] = from_intervals(self.layout.seq_len, nodes)
        return self._node_layouts[inner_size]

    def orders(self, inner_size: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the index that puts the tokens of this rank's node into stream order, and back.

        Before, they lie rank after rank; None where that is stream order already.
        """
        if (inner_size, device) not in self._orders:
            first = self.cp_rank - self.cp_rank % inner_size
            ranks = range(first, first + inner_size)
            together = np.concatenate([self.positions(r) for r in ranks])
            order = np.argsort(together)
            if np.array_equal(order, np.arange(len(order))):
                self._orders[inner_size, device] = (None, None)
            else:
                there = torch.from_numpy(order).to(device)
                back = torch.from_numpy(np.argsort(order)).to(device)
                self._orders[inner_size, device] = (there, back)
        return self._orders[inner_size, device]

    def _step(self, k_positions: IntArray, heads: tuple[int, ...]) -> Step:
        q_positions = self.positions(self.cp_rank)
        if self._form is None:
            return TileStep(self.mask, q_positions, k_positions, heads)
        return DenseStep(dense_calls(self._form, q_positions, k_positions))


@functools.lru_cache(maxsize=64)
def workload(
    mask: Mask, layout: Layout, cp_rank: int, heads: tuple[int, ...], num_kv_heads: int
) -> Workload:
    """Return the workload of a rank, the same object for the same mask and layout objects."""
    return Workload(mask, layout, cp_rank, heads, num_kv_heads)


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
