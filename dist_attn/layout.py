"""Which rank of a group holds which tokens of the group's packed stream, and the inverse.

A group's documents lie one after the other in a stream of `seq_len` tokens. A layout deals the
stream's positions out to the ranks: every position to one rank, every rank's positions ascending.
Ranks may hold different numbers of tokens, also none, and no document is ever padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dist_attn.errors import PlanError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tokens of every rank, as intervals of stream positions.

    Attributes:
        seq_len: tokens of the stream.
        pieces: per rank int64 [n, 2], ascending half-open intervals that neither overlap nor touch.
    """

    seq_len: int
    pieces: tuple[IntArray, ...]

    @property
    def cp_size(self) -> int:
        """Number of ranks."""
        return len(self.pieces)

    @cached_property
    def local_seq_lens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(int((p[:, 1] - p[:, 0]).sum()) for p in self.pieces)

    def local_seq_len(self, cp_rank: int) -> int:
        """Tokens that `cp_rank` holds."""
        return self.local_seq_lens[cp_rank]

    def positions(self, cp_rank: int) -> IntArray:
        """Stream positions of the tokens of `cp_rank`, int64 [local_seq_len], ascending."""
        return _expand(self.pieces[cp_rank])

    @cached_property
    def stream_order(self) -> IntArray:
        """Where each stream position is found when the ranks' tokens lie rank after rank.

        int64 [seq_len]: `concatenated[stream_order]` is the stream.
        """
        order = np.empty(self.seq_len, dtype=np.int64)
        order[self.rank_order] = np.arange(self.seq_len)
        return order

    @cached_property
    def rank_order(self) -> IntArray:
        """Stream positions of the tokens rank after rank, int64 [seq_len]."""
        return np.concatenate([self.positions(r) for r in range(self.cp_size)])

    def validate(self) -> None:
        """Check that every position of the stream is held exactly once.

        Raises:
            PlanError: it is not.
        """
        if not self.pieces:
            raise PlanError("a layout needs at least one rank")
        if any((p[1:, 0] <= p[:-1, 1]).any() or (p[:, 0] >= p[:, 1]).any() for p in self.pieces):
            raise PlanError("a rank's intervals must ascend and neither overlap nor touch")
        every = np.concatenate(self.pieces)
        every = every[np.argsort(every[:, 0])]
        ends = np.concatenate([[0], every[:, 1]])
        if not np.array_equal(ends[:-1], every[:, 0]) or ends[-1] != self.seq_len:
            raise PlanError(f"the layout does not hold each of {self.seq_len} tokens exactly once")


def make_layout(kind: str, cu_seqlens: Sequence[int] | IntArray, cp_size: int) -> Layout:
    """Deal a packed stream out to `cp_size` ranks.

    Args:
        kind: `contiguous`: rank after rank, equal shares. `zigzag`: of each document, rank r holds
            the r-th piece from the front and the r-th from the back, so that each rank has an equal
            share of its causal area; shares differ by one token at most over all documents.
        cu_seqlens: [num_docs + 1] boundaries of the documents, from 0; documents may be empty.
        cp_size: number of ranks.
    """
    if kind not in _KINDS:
        raise PlanError(f"unknown layout '{kind}'; known are {', '.join(sorted(_KINDS))}")
    if cp_size < 1:
        raise PlanError(f"a layout needs at least one rank, got {cp_size}")
    cu = check_cu_seqlens(cu_seqlens)
    return _KINDS[kind](cu, cp_size)


def check_cu_seqlens(cu_seqlens: Sequence[int] | IntArray) -> IntArray:
    """Return the boundaries as int64, refusing what does not ascend from 0."""
    cu = np.asarray(cu_seqlens, dtype=np.int64)
    if cu.ndim != 1 or cu.size < 1 or cu[0] != 0 or (np.diff(cu) < 0).any():
        raise PlanError(f"cu_seqlens must ascend from 0, got {np.asarray(cu_seqlens).tolist()!r}")
    return cu


def from_intervals(seq_len: int, intervals: Sequence[IntArray]) -> Layout:
    """Make a layout from intervals per rank, in any order, possibly empty or touching."""
    return Layout(seq_len, tuple(_merge(np.asarray(i, np.int64).reshape(-1, 2)) for i in intervals))


def _contiguous(cu: IntArray, cp_size: int) -> Layout:
    bounds = np.arange(cp_size + 1) * int(cu[-1]) // cp_size
    return from_intervals(int(cu[-1]), [bounds[None, r : r + 2] for r in range(cp_size)])


def _zigzag(cu: IntArray, cp_size: int) -> Layout:
    lengths = np.diff(cu)
    # Tokens left over by a document's equal split go to the ranks next in turn, so that many short
    # documents do not all burden the same rank.
    extra = lengths % cp_size
    turn = (np.cumsum(extra) - extra) % cp_size
    ranks = np.arange(cp_size)
    gets_extra = (ranks[None] - turn[:, None]) % cp_size < extra[:, None]
    share = lengths[:, None] // cp_size + gets_extra
    front = (share + 1) // 2
    back = share - front
    sizes = np.concatenate([front, back[:, ::-1]], axis=1)
    ends = cu[:-1, None] + np.cumsum(sizes, axis=1)
    starts = ends - sizes
    intervals = []
    for r in range(cp_size):
        chunks = [r, 2 * cp_size - 1 - r]
        intervals.append(np.stack([starts[:, chunks], ends[:, chunks]], axis=-1))
    return from_intervals(int(cu[-1]), intervals)


_KINDS: dict[str, Callable[[IntArray, int], Layout]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
}


def _merge(intervals: IntArray) -> IntArray:
    """Sort the intervals, drop empty ones and join those that touch."""
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    if len(intervals) < 2:
        return intervals
    begins = np.concatenate([[True], intervals[1:, 0] > intervals[:-1, 1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([intervals[begins, 0], intervals[ends, 1]], axis=1)


def _expand(intervals: IntArray) -> IntArray:
    """All integers of ascending intervals."""
    sizes = intervals[:, 1] - intervals[:, 0]
    shift = intervals[:, 0] - (np.cumsum(sizes) - sizes)
    return np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(shift, sizes)
