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
class StridedBlocks(Mask):
    """Every query attends to each `stride`-th block of keys, shifted from head to head.

    Head h sees the blocks b with b % stride == (offset + h * head_shift) % stride.
    """

    seq_len: int
    block: int
    stride: int
    offset: int = 0
    head_shift: int = 0

    def __post_init__(self) -> None:
        if min(self.block, self.stride) < 1:
            raise PlanError(f"block and stride are 1 or more, got {self.block}, {self.stride}")

    def _residue(self, head: int) -> int:
        return (self.offset + head * self.head_shift) % self.stride

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return self._residue(head)

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return (k // self.block % self.stride == self._residue(head)) & (q >= 0)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        step = self.block * self.stride
        starts = np.arange(self._residue(head) * self.block, self.seq_len, step, dtype=np.int64)
        keys = np.stack([starts, np.minimum(starts + self.block, self.seq_len)], axis=1)
        return [Part(np.zeros(1, np.int64), np.full(1, NO_END), keys)]

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self.touched(first, last, head)


@dataclass(frozen=True, eq=False)
class BlockList(Mask):
    """Each block of queries attends to the listed blocks of keys.

    Attributes:
        block_q: tokens of a query block.
        block_k: tokens of a key block.
        blocks: int64 [heads, query blocks, n] indices of key blocks, -1 where a list is shorter;
            one head's list serves all heads. A block may be listed twice.
    """

    block_q: int
    block_k: int
    blocks: IntArray

    def __post_init__(self) -> None:
        if self.blocks.ndim != 3 or min(self.block_q, self.block_k) < 1:
            raise PlanError(
                f"a block list is [heads, query blocks, n] with blocks of a token at least, got "
                f"{self.blocks.shape} and blocks of {self.block_q} and {self.block_k}"
            )

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return head if len(self.blocks) > 1 else 0

    def _of(self, head: int) -> IntArray:
        if len(self.blocks) > 1 and head >= len(self.blocks):
            raise PlanError(f"the block list has {len(self.blocks)} heads, head {head} was asked")
        return self.blocks[head if len(self.blocks) > 1 else 0]

    def _rows(self, q_block: IntArray, head: int) -> IntArray:
        listed = self._of(head)
        if q_block.size and q_block.max() >= len(listed):
            raise PlanError(
                f"the block list ends at query block {len(listed) - 1}, position "
                f"{int(q_block.max()) * self.block_q} was asked"
            )
        return listed[q_block]

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        listed = self._rows(np.asarray(q) // self.block_q, head)
        return (listed == np.asarray(k)[..., None] // self.block_k).any(-1)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        from_block, to_block = first // self.block_q, last // self.block_q
        parts = []
        for ahead in range(int((to_block - from_block).max(initial=0)) + 1):
            listed = self._rows(np.minimum(from_block + ahead, to_block), head)
            parts += [self._part(listed[:, j]) for j in range(listed.shape[1])]
        return parts

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        listed = self._rows(first // self.block_q, head)
        one_block = first // self.block_q == last // self.block_q
        return [self._part(np.where(one_block, listed[:, j], -1)) for j in range(listed.shape[1])]

    def _part(self, k_block: IntArray) -> Part:
        lo = k_block * self.block_k
        return Part(lo, np.where(k_block < 0, lo, lo + self.block_k))


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

    @property
    def exact_rows(self) -> bool:
        """See `Mask`."""
        return all(m.exact_rows for m in self.masks)

    def _of(self, head: int) -> Mask:
        return self.masks[head % len(self.masks)]

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return id(self._of(head)), self._of(head).pattern(head)

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self._of(head).allows(q, k, head)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self._of(head).touched(first, last, head)

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self._of(head).full(first, last, head)


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
