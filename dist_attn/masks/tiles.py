"""Lists of the tiles of a mask, for any tokens on either side, in a table of the rows' size.

A tile is a stretch of local queries against a stretch of local keys. Local tokens ascend in stream
position but may have gaps, so a stretch is known by its first and last position.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.layout import IntArray
from dist_attn.masks.base import Mask
from dist_attn.masks.parts import (
    Part,
    count_below,
    split_by_keys,
    stack_parts,
    subtract_per_row,
    union_per_row,
)


@dataclass(frozen=True, eq=False)
class Slices:
    """For each row some slices of one ascending array of key tiles.

    Attributes:
        tiles: int64 [m] key tiles, shared by all rows.
        begin: int64 [rows, n] first index into `tiles`, ascending along n.
        end: int64 [rows, n] end of the slice; the slices of a row are disjoint.
    """

    tiles: IntArray
    begin: IntArray
    end: IntArray

    def expand(self) -> tuple[IntArray, IntArray]:
        """Return row and key tile of every entry."""
        counts = (self.end - self.begin).reshape(-1)
        of = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = of // max(self.begin.shape[1], 1)
        return rows, self.tiles[self.begin.reshape(-1)[of] + within]


@dataclass(frozen=True, eq=False)
class TileLists:
    """The tiles of one head that are not empty: those allowed in full, and the rest.

    A partial tile may turn out empty where rules are combined; no tile is in both lists, and none
    is listed twice.
    """

    full: tuple[Slices, ...]
    partial: tuple[Slices, ...]
    num_rows: int
    num_keys: int

    def counts(self) -> tuple[int, int]:
        """Return the numbers of full and partial tiles."""
        full, partial = (
            sum(int((s.end - s.begin).sum()) for s in kind) for kind in (self.full, self.partial)
        )
        return full, partial

    def nbytes(self) -> int:
        """Return the memory of the lists."""
        slices = (*self.full, *self.partial)
        return sum(s.tiles.nbytes + s.begin.nbytes + s.end.nbytes for s in slices)

    def expand(self, in_order: bool = True) -> tuple[IntArray, IntArray, IntArray]:
        """Return row, key tile and kind (1 full, 0 partial) of every tile, by row, then key.

        Without `in_order` they come as they are, which is faster.
        """
        rows, keys, kinds = [], [], []
        for kind, slices in ((1, self.full), (0, self.partial)):
            for s in slices:
                row, key = s.expand()
                rows.append(row)
                keys.append(key)
                kinds.append(np.full(len(row), kind))
        row, key, kinds_ = (
            np.concatenate(x) if x else np.empty(0, np.int64) for x in (rows, keys, kinds)
        )
        if not in_order:
            return row, key, kinds_
        order = np.argsort(row * self.num_keys + key, kind="stable")
        return row[order], key[order], kinds_[order]


def stretches(positions: IntArray, size: int) -> IntArray:
    """Return the first and last position of each stretch of `size` tokens, int64 [n, 2]."""
    first = positions[::size]
    last = positions[np.minimum(np.arange(len(first)) * size + size, len(positions)) - 1]
    return np.stack([first, last], axis=1)


def tile_lists(mask: Mask, q_stretches: IntArray, k_stretches: IntArray, head: int) -> TileLists:
    """Return the tiles of one head.

    Args:
        mask: the mask.
        q_stretches: int64 [rows, 2] first and last position, inclusive, of each row's queries.
        k_stretches: int64 [keys, 2] the same of the key tiles, ascending and disjoint.
        head: the query head.
    """
    first, last = q_stretches[:, 0], q_stretches[:, 1]
    tiles = _KeyTiles(k_stretches)
    touched = [tiles.touched(p) for p in mask.touched(first, last, head)]
    full = [tiles.full(p) for p in mask.full(first, last, head)]
    num_rows, num_keys = len(q_stretches), len(k_stretches)
    full_slices: list[Slices] = []
    partial_slices: list[Slices] = []
    for atom in split_by_keys([*touched, *full], num_keys):
        members = _members(atom.keys)
        lo, hi = (
            union_per_row(*stack_parts(parts, num_rows, num_keys))
            for parts in (
                [full[i - len(touched)] for i in atom.parts if i >= len(touched)],
                [touched[i] for i in atom.parts if i < len(touched)],
            )
        )
        for slices, columns in (
            (full_slices, lo),
            (partial_slices, subtract_per_row(*hi, *lo)),
        ):
            begin, end = (np.searchsorted(members, c) for c in columns)
            if (begin < end).any():
                slices.append(Slices(members, begin, np.maximum(begin, end)))
    return TileLists(tuple(full_slices), tuple(partial_slices), num_rows, num_keys)


class _KeyTiles:
    """From keys to the tiles of keys that they lie in."""

    def __init__(self, stretches: IntArray) -> None:
        self._stretches = stretches
        self._first = _Marks(stretches[:, 0])
        self._last = _Marks(stretches[:, 1])

    def touched(self, part: Part) -> Part:
        """Turn keys into the tiles that hold one of them."""
        lo, hi = self._last.below(part.lo), self._first.below(part.hi)
        # An empty interval touches nothing, also where it lies inside a tile.
        hi = np.where(part.hi > part.lo, hi, lo)
        if part.keys is None:
            return Part(lo, hi)
        return Part(lo, hi, _runs(_held(part.keys, self._stretches) > 0))

    def full(self, part: Part) -> Part:
        """Turn keys into the tiles that hold nothing else."""
        lo, hi = self._first.below(part.lo), self._last.below(part.hi)
        if part.keys is None:
            return Part(lo, hi)
        size = self._stretches[:, 1] + 1 - self._stretches[:, 0]
        return Part(lo, hi, _runs(_held(part.keys, self._stretches) == size))


class _Marks:
    """Ascending positions, and how many of them are below others.

    Those of tokens in sequence are evenly spaced but for the last, and need no search.
    """

    def __init__(self, marks: IntArray) -> None:
        self._marks = np.ascontiguousarray(marks)
        steps = np.diff(marks[:-1])
        self._step = int(steps[0]) if len(steps) and (steps == steps[0]).all() else 0

    def below(self, positions: IntArray) -> IntArray:
        """Return for each position the number of marks below it."""
        if not self._step:
            return np.searchsorted(self._marks, positions, side="left").astype(np.int64)
        reached = (positions - self._marks[0] + self._step - 1) // self._step
        evenly = np.clip(reached, 0, len(self._marks) - 1)
        return np.asarray(evenly + (positions > self._marks[-1]), dtype=np.int64)


def _held(keys: IntArray, k_stretches: IntArray) -> IntArray:
    """Positions of a key set between the first and the last position of each stretch."""
    return count_below(keys, k_stretches[:, 1] + 1) - count_below(keys, k_stretches[:, 0])


def _runs(chosen: np.ndarray) -> IntArray:
    """Turn a bool per tile into intervals of tiles."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2)


def _members(intervals: IntArray) -> IntArray:
    sizes = intervals[:, 1] - intervals[:, 0]
    shift = intervals[:, 0] - (np.cumsum(sizes) - sizes)
    return np.arange(int(sizes.sum())) + np.repeat(shift, sizes)
