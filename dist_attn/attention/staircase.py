"""Cut the attention between two ranks' tokens into calls of dense kernels.

Both ranks hold their tokens in stream order. Of a document, a query sees the keys of another rank
up to its own position: the more the later it is, a staircase. A staircase is cut into rectangles
and triangles whose queries and whose keys are disjoint within a call, so that a packed kernel does
all documents at once. For zigzag and contiguous layouts that is one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.layout import IntArray
from dist_attn.masks import DenseForm

Row = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class DenseCall:
    """Segments of local queries against segments of local keys, ascending and disjoint.

    Attributes:
        q: int64 [n, 2] half-open intervals of the queries' local indices.
        k: int64 [n, 2] half-open intervals of the keys' local indices; causal segments are square.
        causal: whether each segment is a triangle.
    """

    q: IntArray
    k: IntArray
    causal: bool

    @property
    def area(self) -> int:
        """Allowed pairs."""
        num_q, num_k = self.q[:, 1] - self.q[:, 0], self.k[:, 1] - self.k[:, 0]
        return int((num_q * (num_q + 1) // 2 if self.causal else num_q * num_k).sum())


def dense_calls(form: DenseForm, q_positions: IntArray, k_positions: IntArray) -> list[DenseCall]:
    """Return the calls that together cover every allowed pair exactly once.

    Args:
        form: the mask.
        q_positions: int64 [Lq] ascending stream positions of the queries.
        k_positions: int64 [Lk] ascending stream positions of the keys.
    """
    q_bounds = np.searchsorted(q_positions, form.cu_seqlens)
    k_bounds = np.searchsorted(k_positions, form.cu_seqlens)
    if not form.causal:
        both = (np.diff(q_bounds) > 0) & (np.diff(k_bounds) > 0)
        return _calls([(_intervals(q_bounds)[both], _intervals(k_bounds)[both], False)])
    if np.array_equal(q_positions, k_positions):
        own = np.diff(q_bounds) > 0
        return _calls([(_intervals(q_bounds)[own], _intervals(q_bounds)[own], True)])
    return _staircases(q_positions, k_positions, q_bounds, k_bounds)


def _staircases(
    q_positions: IntArray, k_positions: IntArray, q_bounds: IntArray, k_bounds: IntArray
) -> list[DenseCall]:
    document = np.repeat(np.arange(len(q_bounds) - 1), np.diff(q_bounds))
    visible = np.searchsorted(k_positions, q_positions, side="right") - k_bounds[document]
    # Of each document the queries that see nothing are its first ones; the rest stay in sequence.
    seeing = np.flatnonzero(visible > 0)
    if len(seeing) == 0:
        return []
    document, visible = document[seeing], visible[seeing]
    opens, ends, diagonal = _steps(document, visible)
    document, keys = document[opens], visible[opens] - diagonal
    starts, ends = seeing[opens], seeing[ends - 1] + 1
    first_key = k_bounds[document]
    # A diagonal step is a rectangle up to its first query's last key, and a triangle from there.
    corner = first_key + keys
    triangles_q = np.stack([starts, ends], 1)[diagonal]
    triangles_k = np.stack([corner, corner + ends - starts], 1)[diagonal]
    levels: dict[int, list[Row]] = {0: []}
    first_step = np.flatnonzero(np.diff(document, prepend=-1))
    num_steps = np.diff(first_step, append=len(document))
    for first, count in zip(first_step[num_steps > 1], num_steps[num_steps > 1], strict=True):
        steps = slice(first, first + count)
        bounds = [*starts[steps].tolist(), int(ends[steps][-1])]
        _cut(bounds, corner[steps].tolist(), int(first_key[first]), 0, levels)
    single = first_step[num_steps == 1]
    single = single[corner[single] > first_key[single]]
    rectangles = np.stack([starts[single], ends[single], first_key[single], corner[single]], axis=1)
    pieces: list[tuple[IntArray, IntArray, bool]] = [(triangles_q, triangles_k, True)]
    for level in sorted(levels):
        rows = np.array(levels[level], dtype=np.int64).reshape(-1, 4)
        if level == 0:
            rows = np.concatenate([rectangles, rows])
        pieces.append((rows[:, :2], rows[:, 2:], False))
    return _calls(pieces)


def _steps(document: IntArray, visible: IntArray) -> tuple[IntArray, IntArray, np.ndarray]:
    """Cut the queries where the number of visible keys stops being level, or rising by one.

    Returns the first query and the end of each step, and whether it rises.
    """
    rise = np.full(len(visible), -1)
    rise[1:] = np.diff(visible)
    rise[1:][np.diff(document) != 0] = -1
    # A query opens a step at a new document or a jump, and where level turns into rising by one or
    # back. Right behind a jump both go on.
    jumps = (rise != 0) & (rise != 1)
    opens = jumps.copy()
    opens[2:] |= (rise[2:] != rise[1:-1]) & ~jumps[1:-1]
    starts = np.flatnonzero(opens)
    ends = np.append(starts[1:], len(visible))
    long = ends - starts > 1
    diagonal = np.zeros(len(starts), dtype=bool)
    diagonal[long] = visible[starts[long] + 1] - visible[starts[long]] == 1
    return starts, ends, diagonal


def _cut(
    bounds: list[int], reach: list[int], from_key: int, depth: int, levels: dict[int, list[Row]]
) -> None:
    """Halve a staircase: its upper half against the keys of its lower half, then both halves.

    Step i are the queries from bounds[i] to bounds[i + 1], which see the keys up to reach[i].
    """
    if len(reach) > 1:
        middle = len(reach) // 2
        shared = reach[middle]
        _cut(bounds[: middle + 1], reach[:middle], from_key, depth + 1, levels)
        _cut(bounds[middle:], reach[middle:], shared, depth + 1, levels)
    else:
        shared, middle = reach[0], 0
    if shared > from_key:
        levels.setdefault(depth, []).append((bounds[middle], bounds[-1], from_key, shared))


def _intervals(bounds: IntArray) -> IntArray:
    return np.stack([bounds[:-1], bounds[1:]], axis=1)


def _calls(pieces: list[tuple[IntArray, IntArray, bool]]) -> list[DenseCall]:
    calls = []
    for q, k, causal in pieces:
        order = np.argsort(q[:, 0], kind="stable")
        if len(q):
            calls.append(DenseCall(q[order], k[order], causal))
    return calls
