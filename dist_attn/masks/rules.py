"""The rules that masks are composed of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.layout import IntArray, check_cu_seqlens
from dist_attn.masks.base import BoolArray, Mask
from dist_attn.masks.parts import NO_END, Part


class IntervalRule(Mask):
    """A rule by which a query sees one interval of keys that moves only forward with the query."""

    @abstractmethod
    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """Return the first key and the end of the keys of each query, both non-decreasing."""

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        lo, hi = self.bounds(q)
        return (lo <= k) & (k < hi)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return [Part(self.bounds(first)[0], self.bounds(last)[1])]

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return [Part(self.bounds(last)[0], self.bounds(first)[1])]


@dataclass(frozen=True, eq=False)
class Full(IntervalRule):
    """Every query attends to every key."""

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        return np.zeros_like(q), np.full_like(q, NO_END)


@dataclass(frozen=True, eq=False)
class Causal(IntervalRule):
    """A query attends to itself and what is before it."""

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        return np.zeros_like(q), q + 1


@dataclass(frozen=True, eq=False)
class Window(IntervalRule):
    """A query attends to `left` tokens before it, itself, and `right` after it; -1: unlimited."""

    left: int
    right: int

    def __post_init__(self) -> None:
        if self.left < -1 or self.right < -1:
            raise PlanError(
                f"a window's sides are -1 (unlimited) or more, got {self.left}, {self.right}"
            )

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        lo = np.zeros_like(q) if self.left < 0 else q - self.left
        hi = np.full_like(q, NO_END) if self.right < 0 else q + self.right + 1
        return lo, hi


@dataclass(frozen=True, eq=False)
class Documents(IntervalRule):
    """A query attends to the keys of its own document.

    Attributes:
        cu_seqlens: boundaries of the documents in the stream, from 0 to its length; documents may
            be empty.
    """

    cu_seqlens: IntArray

    def __init__(self, cu_seqlens: Sequence[int] | IntArray) -> None:
        object.__setattr__(self, "cu_seqlens", _frozen(cu_seqlens))

    @property
    def seq_len(self) -> int:
        """Tokens of the stream."""
        return int(self.cu_seqlens[-1])

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        check_length("documents", self.seq_len, seq_len)

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        return _start_and_end(self.cu_seqlens, q)


@dataclass(frozen=True, eq=False)
class DocumentPrefix(IntervalRule):
    """A query attends to the first tokens of its own document: a prefix, a question, or sinks.

    Attributes:
        cu_seqlens: boundaries of the documents.
        prefix_lens: tokens of each document's prefix, at most the document; one number for all.
    """

    cu_seqlens: IntArray
    prefix_lens: IntArray

    def __init__(
        self, cu_seqlens: Sequence[int] | IntArray, prefix_lens: Sequence[int] | IntArray | int
    ) -> None:
        cu = _frozen(cu_seqlens)
        lens = np.broadcast_to(np.asarray(prefix_lens, dtype=np.int64), len(cu) - 1)
        if (lens < 0).any():
            raise PlanError(f"prefixes have 0 tokens or more, got {lens.tolist()}")
        object.__setattr__(self, "cu_seqlens", cu)
        object.__setattr__(self, "prefix_lens", np.minimum(lens, np.diff(cu)))

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        check_length("documents", int(self.cu_seqlens[-1]), seq_len)

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        start, _ = _start_and_end(self.cu_seqlens, q)
        return start, start + self.prefix_lens[_interval_of(self.cu_seqlens, q)]


@dataclass(frozen=True, eq=False)
class BlockCausal(IntervalRule):
    """A query attends to its own block, as a whole, and to every block before it.

    Attributes:
        cu_blocks: boundaries of the blocks in the stream.
    """

    cu_blocks: IntArray

    def __init__(self, cu_blocks: Sequence[int] | IntArray) -> None:
        object.__setattr__(self, "cu_blocks", _frozen(cu_blocks))

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        check_length("blocks", int(self.cu_blocks[-1]), seq_len)

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        return np.zeros_like(q), _start_and_end(self.cu_blocks, q)[1]


@dataclass(frozen=True, eq=False)
class BlockDistance(IntervalRule):
    """A query attends to the block that is `distance` blocks before its own, and as far as `to`.

    Blocks are `block` tokens long, counted from the stream's start; `to` defaults to `distance`.
    """

    block: int
    distance: int
    to: int | None = None

    def __post_init__(self) -> None:
        if self.block < 1 or (self.to is not None and self.to > self.distance):
            raise PlanError(
                f"blocks have a token at least and distances run from far to near, got block "
                f"{self.block}, distance {self.distance}, to {self.to}"
            )

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        to = self.distance if self.to is None else self.to
        q_block = q // self.block
        return (q_block - self.distance) * self.block, (q_block - to + 1) * self.block


@dataclass(frozen=True, eq=False)
class Keys(IntervalRule):
    """Every query attends to the keys of [start, end): sinks, or global tokens."""

    start: int
    end: int

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        return np.full_like(q, self.start), np.full_like(q, self.end)


@dataclass(frozen=True, eq=False)
class Queries(Mask):
    """The queries of [start, end) attend to every key, the others to none."""

    start: int
    end: int

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return (self.start <= q) & (q < self.end) & (k >= 0)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        some = (first < self.end) & (last >= self.start) & (self.start < self.end)
        return [Part(np.zeros_like(first), np.where(some, NO_END, 0))]

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        every = (first >= self.start) & (last < self.end)
        return [Part(np.zeros_like(first), np.where(every, NO_END, 0))]


@dataclass(frozen=True, eq=False)
class Predicate(Mask):
    """A rule of the user's own inside another mask, which says where it may hold at all.

    Attributes:
        function: takes broadcastable arrays of query and key positions and a head.
        within: a mask that allows everything that `function` allows and more; what it leaves out is
            never looked at.
    """

    function: Callable[[IntArray, IntArray, int], BoolArray]
    within: Mask

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        self.within.check(seq_len)

    @property
    def exact_rows(self) -> bool:
        """See `Mask`."""
        return False

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return head

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.within.allows(q, k, head) & self.function(q, k, head)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`; here a superset also for single queries."""
        return self.within.touched(first, last, head)

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return []


@dataclass(frozen=True, eq=False)
class PerHead(Mask):
    """A mask for each query head; fewer masks than heads are repeated in turn."""

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        if not self.masks:
            raise PlanError("a mask per head needs one mask at least")

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        for mask in self.masks:
            mask.check(seq_len)

    @property
    def exact_rows(self) -> bool:
        """See `Mask`."""
        return all(m.exact_rows for m in self.masks)

    def _of(self, head: int) -> Mask:
        return self.masks[head % len(self.masks)]

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return id(self._of(head)), self._of(head).pattern(head)

    def interval_pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return id(self._of(head)), self._of(head).interval_pattern(head)

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self._of(head).allows(q, k, head)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self._of(head).touched(first, last, head)

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self._of(head).full(first, last, head)


def check_length(what: str, held: int, seq_len: int) -> None:
    """Refuse a stream of another length than a mask was made for."""
    if held != seq_len:
        raise PlanError(
            f"the mask's {what} hold {held} tokens, the stream {seq_len}; make both from the same "
            f"cu_seqlens"
        )


def _frozen(cu_seqlens: Sequence[int] | IntArray) -> IntArray:
    cu = check_cu_seqlens(cu_seqlens).copy()
    cu.setflags(write=False)
    return cu


def _interval_of(cu: IntArray, positions: IntArray) -> IntArray:
    return np.clip(np.searchsorted(cu, positions, side="right") - 1, 0, max(len(cu) - 2, 0))


def _start_and_end(cu: IntArray, positions: IntArray) -> tuple[IntArray, IntArray]:
    if len(cu) < 2:
        nothing = np.zeros_like(positions)
        return nothing, nothing
    i = _interval_of(cu, positions)
    return cu[i], cu[i + 1]
