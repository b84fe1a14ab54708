"""Sets of keys, one per row, as a few intervals of which some are thinned by a set of keys.

A row is a query or a range of queries. The keys of all rows are a union of parts; a part is one
interval per row, of which only the keys in `keys` count if it is given. So causal, window and
document masks are one part each, and a strided pattern is one part whose `keys` are the strided
blocks: a table of the size of the rows, not of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dist_attn.layout import IntArray

#: An end beyond every position.
NO_END = 2**62
MAX_KEY_SETS = 8
#: Outweighs every number of intervals that hold one point.
NO_MORE = 1 << 32


@dataclass(frozen=True, eq=False)
class Part:
    """Half-open key intervals, one per row, possibly empty.

    Attributes:
        lo: int64 [n] or [1].
        hi: int64 [n] or [1].
        keys: int64 [m, 2] ascending disjoint intervals of the keys that count; None: all.
    """

    lo: IntArray
    hi: IntArray
    keys: IntArray | None = None

    def __and__(self, other: Part) -> Part:
        """Keys of both, row by row."""
        keys = self.keys if other.keys is None else other.keys
        if self.keys is not None and other.keys is not None:
            keys = intersect(self.keys, other.keys)
        return Part(np.maximum(self.lo, other.lo), np.minimum(self.hi, other.hi), keys)


def intersect(a: IntArray, b: IntArray) -> IntArray:
    """Positions in both of two sets of ascending disjoint intervals."""
    if len(a) == 0 or len(b) == 0:
        return np.empty((0, 2), dtype=np.int64)
    # Of each interval of a, the intervals of b that end behind its start and start before its end.
    first = np.searchsorted(b[:, 1], a[:, 0], side="right")
    end = np.searchsorted(b[:, 0], a[:, 1], side="left")
    counts = np.maximum(end - first, 0)
    of_a = np.repeat(np.arange(len(a)), counts)
    of_b = np.arange(len(of_a)) - np.repeat(np.cumsum(counts) - counts, counts) + first[of_a]
    lo = np.maximum(a[of_a, 0], b[of_b, 0])
    hi = np.minimum(a[of_a, 1], b[of_b, 1])
    return np.stack([lo, hi], axis=1)


def merge(intervals: IntArray) -> IntArray:
    """Positions in any of the intervals, as ascending intervals that do not touch."""
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    if len(intervals) == 0:
        return intervals
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1])
    begins = np.concatenate([[True], intervals[1:, 0] > reach[:-1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([intervals[begins, 0], reach[ends]], axis=1)


def count_below(keys: IntArray, positions: IntArray) -> IntArray:
    """How many positions of a set of intervals are below each given position."""
    if len(keys) == 0:
        return np.zeros(positions.shape, dtype=np.int64)
    sizes = keys[:, 1] - keys[:, 0]
    before = np.concatenate([[0], np.cumsum(sizes)])
    i = np.searchsorted(keys[:, 0], positions, side="right") - 1
    inside = np.clip(positions - keys[np.maximum(i, 0), 0], 0, sizes[np.maximum(i, 0)])
    return np.where(i < 0, 0, before[np.maximum(i, 0)] + inside)


def union_per_row(lo: IntArray, hi: IntArray) -> tuple[IntArray, IntArray]:
    """Make the columns of [n, m] intervals ascending and disjoint, covering the same positions."""
    empty = hi <= lo
    used = ~empty.all(axis=0)
    if not used.all():
        lo, hi, empty = lo[:, used], hi[:, used], empty[:, used]
    if empty.any():
        lo, hi = np.where(empty, 0, lo), np.where(empty, 0, hi)
    if lo.shape[1] < 2:
        return lo, hi
    if (lo[:, 1:] < lo[:, :-1]).any():
        order = np.argsort(lo, axis=1, kind="stable")
        lo, hi = np.take_along_axis(lo, order, 1), np.take_along_axis(hi, order, 1)
    reach = np.maximum.accumulate(hi, axis=1)
    lo = np.concatenate([lo[:, :1], np.maximum(lo[:, 1:], reach[:, :-1])], axis=1)
    return lo, np.maximum(hi, lo)


def subtract_per_row(
    lo: IntArray, hi: IntArray, minus_lo: IntArray, minus_hi: IntArray
) -> tuple[IntArray, IntArray]:
    """Remove ascending disjoint columns from ascending disjoint columns, row by row.

    Memory grows with the columns of both, not with their product.
    """
    if minus_lo.shape[1] == 0:
        return lo, hi
    num_rows, num_columns = lo.shape
    rows = np.arange(num_rows)
    if lo.shape == minus_lo.shape:
        # Most tiles are full or empty: where both sides are the same nothing is left.
        rows = np.flatnonzero((lo != minus_lo).any(axis=1) | (hi != minus_hi).any(axis=1))
    ends = [x[rows] for x in (lo, hi, minus_lo, minus_hi)]
    points = np.concatenate(ends, axis=1)
    order = np.argsort(points, axis=1, kind="stable")
    points = np.take_along_axis(points, order, 1)
    # What opens and closes at each point; intervals of no length open and close at the same one.
    change = np.repeat([1, -1, -NO_MORE, NO_MORE], [num_columns] * 2 + [minus_lo.shape[1]] * 2)
    inside = np.cumsum(change[order], axis=1)[:, :-1] == 1
    inside &= points[:, :-1] < points[:, 1:]
    found_row, found = np.nonzero(inside)
    width = int(inside.sum(axis=1).max(initial=0))
    column = np.arange(len(found)) - np.searchsorted(found_row, found_row)
    left_lo = np.zeros((num_rows, width), dtype=np.int64)
    left_hi = left_lo.copy()
    left_lo[rows[found_row], column] = points[found_row, found]
    left_hi[rows[found_row], column] = points[found_row, found + 1]
    return left_lo, left_hi


def stack_parts(parts: Iterable[Part], num_rows: int, end: int) -> tuple[IntArray, IntArray]:
    """Intervals of the parts as columns [num_rows, parts], cut to [0, end)."""
    parts = list(parts)
    if not parts:
        nothing = np.zeros((num_rows, 0), dtype=np.int64)
        return nothing, nothing
    lo = np.stack([np.broadcast_to(p.lo, num_rows) for p in parts], axis=1)
    hi = np.stack([np.broadcast_to(p.hi, num_rows) for p in parts], axis=1)
    return np.clip(lo, 0, end), np.clip(hi, 0, end)


@dataclass(frozen=True, eq=False)
class Atom:
    """Keys that no key set tells apart, and the parts that hold them.

    Attributes:
        keys: int64 [m, 2] intervals of the keys; atoms are disjoint.
        parts: indices of the parts whose keys include these.
    """

    keys: IntArray
    parts: tuple[int, ...]


def split_by_keys(parts: list[Part], end: int) -> list[Atom]:
    """Cut the keys of [0, end) so that every part holds all keys of an atom or none.

    The union of parts is then, atom by atom, a union of plain intervals.
    """
    everything = np.array([[0, end]])
    sets = {p.keys.tobytes(): p.keys for p in parts if p.keys is not None}
    if not sets:
        return [Atom(everything, tuple(range(len(parts))))]
    assert len(sets) <= MAX_KEY_SETS, "a mask combines at most eight different key sets"
    clipped = [intersect(s, everything) for s in sets.values()]
    points = np.unique(np.concatenate([[0, end], *(s.reshape(-1) for s in clipped)]))
    code = np.zeros(len(points) - 1, dtype=np.int64)
    for bit, keys in enumerate(clipped):
        if len(keys):
            i = np.searchsorted(keys[:, 0], points[:-1], side="right") - 1
            code |= ((i >= 0) & (points[:-1] < keys[np.maximum(i, 0), 1])).astype(np.int64) << bit
    bit_of = {name: bit for bit, name in enumerate(sets)}
    segments = np.stack([points[:-1], points[1:]], axis=1)
    atoms = []
    for value in np.unique(code).tolist():
        holding = tuple(
            i for i, p in enumerate(parts)
            if p.keys is None or value >> bit_of[p.keys.tobytes()] & 1
        )  # fmt: skip
        if holding:
            atoms.append(Atom(merge(segments[code == value]), holding))
    return atoms


def count_per_row(parts: list[Part], num_rows: int, end: int) -> IntArray:
    """How many keys of [0, end) each row has, int64 [num_rows]."""
    total = np.zeros(num_rows, dtype=np.int64)
    for atom in split_by_keys(parts, end):
        lo, hi = union_per_row(*stack_parts((parts[i] for i in atom.parts), num_rows, end))
        total += (count_below(atom.keys, hi) - count_below(atom.keys, lo)).sum(axis=1)
    return total


def union_over_rows(parts: list[Part], end: int) -> IntArray:
    """Keys that any row has, as ascending intervals."""
    found = []
    for part in parts:
        lo, hi = np.broadcast_arrays(part.lo, part.hi)
        union = merge(np.stack([np.clip(lo, 0, end), np.clip(hi, 0, end)], axis=1))
        found.append(union if part.keys is None else intersect(union, part.keys))
    return merge(np.concatenate(found)) if found else np.empty((0, 2), dtype=np.int64)
