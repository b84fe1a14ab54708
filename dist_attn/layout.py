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
FloatArray = npt.NDArray[np.float64]


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
        return expand(self.pieces[cp_rank])

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


def make_layout(
    kind: str,
    cu_seqlens: Sequence[int] | IntArray,
    cp_size: int,
    *,
    chunk_tokens: int | None = None,
    chunk_areas: Callable[[IntArray], IntArray] | None = None,
    shares: IntArray | None = None,
) -> Layout:
    """Deal a packed stream out to `cp_size` ranks.

    Args:
        kind: `contiguous`: rank after rank, equal shares.
            `zigzag`: of each document, rank r holds the r-th piece from the front and the r-th from
            the back, so that each rank has an equal share of its causal area; shares differ by one
            token at most over all documents.
            `striped`: chunks in turn, by default of one token.
            `balanced`: chunks dealt so that areas are equal; equal tokens to within a chunk.
            `placed`: zigzag of each document over ranks with given shares.
        cu_seqlens: [num_docs + 1] boundaries of the documents, from 0; documents may be empty.
        cp_size: number of ranks.
        chunk_tokens: tokens of a chunk, for `striped` and `balanced`; by default 1 and as many as
            make 32 chunks per rank.
        chunk_areas: for `balanced`, a function from positions to their areas, such as the mask's
            `row_areas`; by default causal documents.
        shares: for `placed`, int64 [num_docs, cp_size], the tokens of each document on each rank.

    Raises:
        PlanError: an unknown kind, or arguments that it does not take or that do not fit.
    """
    if kind not in _TAKES:
        raise PlanError(f"unknown layout '{kind}'; known are {', '.join(sorted(_TAKES))}")
    if cp_size < 1:
        raise PlanError(f"a layout needs at least one rank, got {cp_size}")
    given = {"chunk_tokens": chunk_tokens, "chunk_areas": chunk_areas, "shares": shares}
    for name, value in given.items():
        if value is not None and name not in _TAKES[kind]:
            raise PlanError(f"layout '{kind}' takes no {name}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise PlanError(f"a chunk has one token at least, got {chunk_tokens}")
    cu = check_cu_seqlens(cu_seqlens)
    match kind:
        case "zigzag":
            return _zigzag(cu, _even_shares(np.diff(cu), cp_size))
        case "placed":
            return _zigzag(cu, _checked_shares(shares, np.diff(cu), cp_size))
        case "striped":
            return _striped(cu, cp_size, chunk_tokens or 1)
        case "balanced":
            return _balanced(cu, cp_size, chunk_tokens, chunk_areas)
    return _contiguous(cu, cp_size)


def shares_of_fractions(lengths: Sequence[int] | IntArray, fractions: FloatArray) -> IntArray:
    """Turn each document's fractions per rank into tokens that add up to the document.

    Tokens lost to rounding down go to the largest remainders, the first rank first.

    Args:
        lengths: int64 [num_docs].
        fractions: float64 [num_docs, cp_size], not negative, not all 0 for a document with tokens.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    total = fractions.sum(axis=1, keepdims=True)
    if (fractions < 0).any() or (total[lengths > 0] <= 0).any():
        raise PlanError("each document's fractions must be 0 or more and not all of them 0")
    exact = fractions / np.where(total > 0, total, 1.0) * lengths[:, None]
    shares = np.floor(exact).astype(np.int64)
    missing = lengths - shares.sum(axis=1)
    order = np.argsort(shares - exact, axis=1, kind="stable")
    np.put_along_axis(
        shares,
        order,
        np.take_along_axis(shares, order, 1) + (np.arange(shares.shape[1]) < missing[:, None]),
        1,
    )
    return shares


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


def _even_shares(lengths: IntArray, cp_size: int) -> IntArray:
    # Tokens left over by a document's equal split go to the ranks next in turn, so that many short
    # documents do not all burden the same rank.
    extra = lengths % cp_size
    turn = (np.cumsum(extra) - extra) % cp_size
    gets_extra = (np.arange(cp_size)[None] - turn[:, None]) % cp_size < extra[:, None]
    return lengths[:, None] // cp_size + gets_extra


def _checked_shares(shares: IntArray | None, lengths: IntArray, cp_size: int) -> IntArray:
    if shares is None:
        raise PlanError("layout 'placed' needs shares, the tokens of each document on each rank")
    shares = np.asarray(shares, dtype=np.int64)
    if shares.shape != (len(lengths), cp_size):
        raise PlanError(f"shares must be [{len(lengths)}, {cp_size}], got {shares.shape}")
    wrong = np.flatnonzero((shares.sum(axis=1) != lengths) | (shares < 0).any(axis=1))
    if len(wrong):
        i = int(wrong[0])
        raise PlanError(
            f"the shares of document {i} must be 0 or more and add up to its {lengths[i]} tokens, "
            f"got {shares[i].tolist()}"
        )
    return shares


def _zigzag(cu: IntArray, shares: IntArray) -> Layout:
    cp_size = shares.shape[1]
    front = (shares + 1) // 2
    back = shares - front
    sizes = np.concatenate([front, back[:, ::-1]], axis=1)
    ends = cu[:-1, None] + np.cumsum(sizes, axis=1)
    starts = ends - sizes
    intervals = []
    for r in range(cp_size):
        chunks = [r, 2 * cp_size - 1 - r]
        intervals.append(np.stack([starts[:, chunks], ends[:, chunks]], axis=-1))
    return from_intervals(int(cu[-1]), intervals)


def _chunks(seq_len: int, chunk_tokens: int) -> IntArray:
    starts = np.arange(0, seq_len, chunk_tokens, dtype=np.int64)
    return np.stack([starts, np.minimum(starts + chunk_tokens, seq_len)], axis=1)


def _striped(cu: IntArray, cp_size: int, chunk_tokens: int) -> Layout:
    chunks = _chunks(int(cu[-1]), chunk_tokens)
    return from_intervals(int(cu[-1]), [chunks[r::cp_size] for r in range(cp_size)])


def _balanced(
    cu: IntArray,
    cp_size: int,
    chunk_tokens: int | None,
    chunk_areas: Callable[[IntArray], IntArray] | None,
) -> Layout:
    seq_len = int(cu[-1])
    if chunk_tokens is None:
        chunk_tokens = max(1, seq_len // (CHUNKS_PER_RANK * cp_size))
        if chunk_tokens > CHUNK_ALIGNMENT:
            chunk_tokens -= chunk_tokens % CHUNK_ALIGNMENT
    chunks = _chunks(seq_len, chunk_tokens)
    positions = np.arange(seq_len)
    if chunk_areas is None:
        start = np.repeat(cu[:-1], np.diff(cu))
        areas = positions - start + 1
    else:
        areas = chunk_areas(positions)
    before = np.concatenate([[0], np.cumsum(areas)])
    area = before[chunks[:, 1]] - before[chunks[:, 0]]
    # Rounds of one chunk per rank, the largest chunks first: in each round the rank that has least
    # so far takes the most. So all ranks hold equally many chunks.
    order = np.argsort(-area, kind="stable")
    load = np.zeros(cp_size, dtype=np.int64)
    held: list[list[int]] = [[] for _ in range(cp_size)]
    for first in range(0, len(order), cp_size):
        ranks = np.argsort(load, kind="stable")
        for chunk, rank in zip(
            order[first : first + cp_size].tolist(), ranks.tolist(), strict=False
        ):
            held[rank].append(chunk)
            load[rank] += area[chunk]
    return from_intervals(seq_len, [chunks[np.array(h, dtype=np.int64)] for h in held])


#: What each kind of layout takes beside documents and ranks.
_TAKES: dict[str, tuple[str, ...]] = {
    "contiguous": (),
    "zigzag": (),
    "striped": ("chunk_tokens",),
    "balanced": ("chunk_tokens", "chunk_areas"),
    "placed": ("shares",),
}
CHUNKS_PER_RANK = 32
#: Larger chunks begin at multiples of this, so that tiles of kernels are not cut.
CHUNK_ALIGNMENT = 64


def _merge(intervals: IntArray) -> IntArray:
    """Sort the intervals, drop empty ones and join those that touch."""
    intervals = intervals[intervals[:, 0] < intervals[:, 1]]
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    if len(intervals) < 2:
        return intervals
    begins = np.concatenate([[True], intervals[1:, 0] > intervals[:-1, 1]])
    ends = np.concatenate([begins[1:], [True]])
    return np.stack([intervals[begins, 0], intervals[ends, 1]], axis=1)


def expand(intervals: IntArray) -> IntArray:
    """Return all integers of ascending intervals."""
    sizes = intervals[:, 1] - intervals[:, 0]
    shift = intervals[:, 0] - (np.cumsum(sizes) - sizes)
    return np.arange(int(sizes.sum()), dtype=np.int64) + np.repeat(shift, sizes)
