"""What each rank of a group has to compute: its queries against every rank's keys.

A workload belongs to a mask, a layout, a rank and some heads. It is made once per micro-batch and
serves every layer; what it is asked for is worked out when it is first asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
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

#: Ranks of a group, by their places in it.
Ranks = tuple[int, ...]


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
        keys: which rank holds which keys, where these are not those of its own tokens.
    """

    def __init__(
        self,
        mask: Mask,
        layout: Layout,
        cp_rank: int,
        heads: tuple[int, ...],
        num_kv_heads: int,
        keys: Layout | None = None,
    ) -> None:
        mask.check(layout.seq_len)
        self.mask = mask
        self.layout = layout
        self.keys = keys or layout
        self.cp_rank = cp_rank
        self.heads = heads
        self.num_kv_heads = num_kv_heads
        self._form = dense_form(mask, layout.seq_len)
        self._positions: dict[int, IntArray] = {}
        self._steps: dict[tuple[int, int], Step] = {}
        self._needed: dict[tuple[int, int], IntArray] = {}
        self._fetches: dict[tuple[int, int, int], Fetch] = {}
        self._node_layouts: dict[Ranks, Layout] = {}
        self._visits: dict[tuple[int, int, int, bool], Workload] = {}
        self._orders: dict[tuple[Ranks, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    def positions(self, cp_rank: int) -> IntArray:
        """Stream positions of a rank's tokens."""
        if cp_rank not in self._positions:
            self._positions[cp_rank] = self.layout.positions(cp_rank)
        return self._positions[cp_rank]

    def key_positions(self, cp_rank: int) -> IntArray:
        """Stream positions of the keys that a rank holds."""
        return self.positions(cp_rank) if self.keys is self.layout else self.keys.positions(cp_rank)

    def step(self, source: int) -> Step:
        """Cut the local queries against all keys of rank `source`."""
        if (source, -1) not in self._steps:
            self._steps[source, -1] = self._step(self.key_positions(source), self.heads)
        return self._steps[source, -1]

    def fetched_step(self, source: int, head_class: int) -> Step:
        """Cut the local queries against the keys fetched from rank `source` for a head class."""
        if (source, head_class) not in self._steps:
            heads = tuple(self.heads[h] for h in self.head_classes[head_class].q_heads)
            own = source == self.cp_rank
            positions = (
                self.key_positions(source)
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
            self._steps[key] = self._step(self.key_positions(self.cp_rank), heads)
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
            last_queries = [_reach(self._form, self.positions(r))[1] for r in range(size)]
            first_keys = [_reach(self._form, self.key_positions(r))[0] for r in range(size)]
            for r, last_query in enumerate(last_queries):
                for s, first_key in enumerate(first_keys):
                    needs[r, s] = (first_key <= last_query).any()
            return needs
        for r in range(size):
            for c in range(len(self.head_classes)):
                needs[r] |= [len(intersect(self.needed(r, c), p)) > 0 for p in self.keys.pieces]
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
            found = intersect(self.needed(needing, head_class), self.keys.pieces[holding])
            rows = np.searchsorted(self.key_positions(holding), found)
            self._fetches[key] = Fetch(Rows(rows), expand(found))
        return self._fetches[key]

    def node_fetch(self, ranks: Sequence[int], holding: int, head_class: int) -> Fetch:
        """Return the keys of rank `holding` that some of several ranks need."""
        needed = merge(np.concatenate([self.needed(r, head_class) for r in ranks]))
        found = intersect(needed, self.keys.pieces[holding])
        return Fetch(Rows(np.searchsorted(self.key_positions(holding), found)), expand(found))

    def visit(
        self, inner_size: int, ahead: int, head_class: int | None, *, whole: bool
    ) -> Workload:
        """Return the work of this rank's node on the keys of the node `ahead` places before it.

        Args:
            inner_size: ranks of a node.
            ahead: how many nodes back the keys come from; 0 for the node's own.
            head_class: of which heads; None for all.
            whole: whether ranks visit with all of their keys, if somebody needs them at this node
                or behind it; else with those that somebody of this node needs.
        """
        key = (inner_size, ahead, -1 if head_class is None else head_class, whole)
        if key not in self._visits:
            node, place = divmod(self.cp_rank, inner_size)
            here = range(node * inner_size, (node + 1) * inner_size)
            source = (node - ahead) % (self.layout.cp_size // inner_size) * inner_size
            keys = []
            for rank in range(source, source + inner_size):
                pieces = self.layout.pieces[rank]
                if ahead and not whole:
                    assert head_class is not None
                    positions = self.node_fetch(here, rank, head_class).positions
                    pieces = np.stack([positions, positions + 1], axis=1)
                elif ahead > self.last_visit(rank, inner_size):
                    pieces = pieces[:0]
                keys.append(pieces)
            heads, num_kv_heads = self.heads, self.num_kv_heads
            if head_class is not None:
                of = self.head_classes[head_class]
                heads, num_kv_heads = tuple(self.heads[h] for h in of.q_heads), len(of.kv_heads)
            seq_len = self.layout.seq_len
            self._visits[key] = Workload(
                self.mask,
                Layout(seq_len, tuple(self.layout.pieces[r] for r in here)),
                place,
                heads,
                num_kv_heads,
                from_intervals(seq_len, keys),
            )
        return self._visits[key]

    def last_visit(self, source: int, inner_size: int) -> int:
        """How many nodes ahead the last one is that needs keys of rank `source`."""
        num_nodes = self.layout.cp_size // inner_size
        by_node = self.needs[:, source].reshape(num_nodes, inner_size).any(axis=1)
        ahead = (np.flatnonzero(by_node) - source // inner_size) % num_nodes
        return int(ahead.max(initial=0))

    def node_layout(self, nodes: tuple[Ranks, ...]) -> Layout:
        """Return the layout in which the ranks of each node are one."""
        key = tuple(r for node in nodes for r in node)
        if key not in self._node_layouts:
            pieces = self.layout.pieces
            together = [np.concatenate([pieces[r] for r in node]) for node in nodes]
            self._node_layouts[key] = from_intervals(self.layout.seq_len, together)
        return self._node_layouts[key]

    def orders(self, node: Ranks, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the index that puts the tokens of a node's ranks into stream order, and back.

        Before, they lie rank after rank; None where that is stream order already.
        """
        if (node, device) not in self._orders:
            together = np.concatenate([self.positions(r) for r in node])
            order = np.argsort(together)
            if np.array_equal(order, np.arange(len(order))):
                self._orders[node, device] = (None, None)
            else:
                there = torch.from_numpy(order).to(device)
                back = torch.from_numpy(np.argsort(order)).to(device)
                self._orders[node, device] = (there, back)
        return self._orders[node, device]

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
