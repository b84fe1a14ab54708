"""Sets of integers on a line as ascending disjoint half-open intervals, int64 [n, 2]."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def overlap(a: IntArray, b: IntArray) -> IntArray:
    """Integers in both sets; an interval of `b` may be empty."""
    if len(a) == 0 or len(b) == 0:
        return np.empty((0, 2), dtype=np.int64)
    first = np.searchsorted(b[:, 1], a[:, 0], side="right")
    counts = np.maximum(np.searchsorted(b[:, 0], a[:, 1], side="left") - first, 0)
    if int(counts.max()) <= 1:
        of_a = np.flatnonzero(counts)
        of_b = first[of_a]
    else:
        of_a = np.repeat(np.arange(len(a)), counts)
        of_b = np.arange(len(of_a)) + np.repeat(first - starts(counts), counts)
    found = np.empty((len(of_a), 2), dtype=np.int64)
    np.maximum(a[of_a, 0], b[of_b, 0], out=found[:, 0])
    np.minimum(a[of_a, 1], b[of_b, 1], out=found[:, 1])
    held = found[:, 0] < found[:, 1]
    return found if held.all() else found[held]


def minus(a: IntArray, b: IntArray) -> IntArray:
    """Integers in `a` that are not in `b`."""
    if len(a) == 0 or len(b) == 0:
        return a
    gaps = np.empty((len(b) + 1, 2), dtype=np.int64)
    gaps[0, 0], gaps[-1, 1] = a[0, 0], max(a[-1, 1], b[-1, 1])
    gaps[1:, 0], gaps[:-1, 1] = b[:, 1], b[:, 0]
    return overlap(a, gaps)


def size_of_union(begin: IntArray, end: IntArray) -> int:
    """How many integers some intervals hold that may overlap, in any order."""
    if len(begin) == 0:
        return 0
    order = np.argsort(begin, kind="stable")
    reach = np.maximum.accumulate(end[order])
    from_here = begin[order]
    np.maximum(from_here[1:], reach[:-1], out=from_here[1:])
    return int(np.maximum(reach - from_here, 0).sum())


def members(a: IntArray) -> IntArray:
    """All integers of the intervals, in their order."""
    counts = a[:, 1] - a[:, 0]
    return np.arange(int(counts.sum())) + np.repeat(a[:, 0] - starts(counts), counts)


def starts(counts: IntArray) -> IntArray:
    """Exclusive running sum."""
    return np.asarray(np.cumsum(counts) - counts, dtype=np.int64)


def ascending(begin: IntArray, end: IntArray) -> IntArray:
    """Put disjoint intervals in order."""
    order = np.argsort(begin)
    return np.stack([begin[order], end[order]], axis=1)
