"""Rules by blocks of keys that are no interval: each so manieth, or listed ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.layout import IntArray, check_cu_seqlens
from dist_attn.masks.base import BoolArray, Mask
from dist_attn.masks.parts import NO_END, Part
from dist_attn.masks.rules import check_length


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

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        check_length("strided blocks", self.seq_len, seq_len)

    def _residue(self, head: int) -> int:
        return (self.offset + head * self.head_shift) % self.stride

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return self._residue(head)

    def interval_pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return 0

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


class ListedBlocks(Mask):
    """Each block of queries attends to listed blocks of keys.

    Attributes:
        blocks: int64 [heads, query blocks, n] indices of key blocks, -1 where a list is shorter;
            one head's list serves all heads. A block may be listed twice.
    """

    blocks: IntArray

    @abstractmethod
    def _q_block(self, q: IntArray) -> IntArray:
        """Return the number of each query's block."""

    @abstractmethod
    def _k_block(self, k: IntArray) -> IntArray:
        """Return the number of each key's block."""

    @abstractmethod
    def _keys_of(self, k_block: IntArray) -> tuple[IntArray, IntArray]:
        """Return the first key and the end of each block, given by numbers that are not -1."""

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return head if len(self.blocks) > 1 else 0

    def area(self, seq_len: int, head: int = 0) -> int:
        """See `Mask`; counted block by block."""
        num_queries = np.bincount(self._q_block(np.arange(seq_len)))
        listed = self._rows(np.arange(len(num_queries)), head)
        new = listed >= 0
        new[:, 1:] &= listed[:, 1:] != listed[:, :-1]  # they are sorted
        lo, hi = (np.minimum(x, seq_len) for x in self._keys_of(np.maximum(listed, 0)))
        return int((np.where(new, hi - lo, 0).sum(axis=1) * num_queries).sum())

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        listed = self._rows(self._q_block(np.asarray(q)), head)
        return (listed == self._k_block(np.asarray(k))[..., None]).any(-1)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        from_block, to_block = self._q_block(first), self._q_block(last)
        parts = []
        for ahead in range(int((to_block - from_block).max(initial=0)) + 1):
            listed = self._rows(np.minimum(from_block + ahead, to_block), head)
            parts += [self._part(listed[:, j]) for j in range(listed.shape[1])]
        return parts

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        q_block = self._q_block(first)
        listed = self._rows(q_block, head)
        one_block = q_block == self._q_block(last)
        return [self._part(np.where(one_block, listed[:, j], -1)) for j in range(listed.shape[1])]

    def _rows(self, q_block: IntArray, head: int) -> IntArray:
        if len(self.blocks) > 1 and head >= len(self.blocks):
            raise PlanError(f"the block list has {len(self.blocks)} heads, head {head} was asked")
        listed = self.blocks[head if len(self.blocks) > 1 else 0]
        if q_block.size and q_block.max() >= len(listed):
            raise PlanError(
                f"the block list ends at query block {len(listed) - 1}, query block "
                f"{int(q_block.max())} was asked; make it for the whole stream"
            )
        return listed[q_block]

    def _part(self, k_block: IntArray) -> Part:
        lo, hi = self._keys_of(np.maximum(k_block, 0))
        return Part(lo, np.where(k_block < 0, lo, hi))

    def _take(self, blocks: IntArray) -> None:
        blocks = np.asarray(blocks)
        if blocks.ndim != 3 or len(blocks) == 0 or not np.issubdtype(blocks.dtype, np.integer):
            raise PlanError(
                f"blocks are integers [heads, query blocks, n] with a head at least, got "
                f"{blocks.dtype} {blocks.shape}"
            )
        # In order, so that no union of a row's blocks has to sort them.
        object.__setattr__(self, "blocks", np.sort(blocks.astype(np.int64, copy=False), axis=2))


@dataclass(frozen=True, eq=False)
class BlockList(ListedBlocks):
    """`ListedBlocks` of one size, but for the last.

    Attributes:
        block_q: tokens of a query block.
        block_k: tokens of a key block.
        blocks: see `ListedBlocks`.
    """

    block_q: int
    block_k: int
    blocks: IntArray

    def __post_init__(self) -> None:
        if min(self.block_q, self.block_k) < 1:
            raise PlanError(
                f"blocks have a token at least, got blocks of {self.block_q} and {self.block_k}"
            )
        self._take(self.blocks)

    def _q_block(self, q: IntArray) -> IntArray:
        return np.asarray(q // self.block_q, dtype=np.int64)

    def _k_block(self, k: IntArray) -> IntArray:
        return np.asarray(k // self.block_k, dtype=np.int64)

    def _keys_of(self, k_block: IntArray) -> tuple[IntArray, IntArray]:
        return k_block * self.block_k, (k_block + 1) * self.block_k


@dataclass(frozen=True, eq=False)
class VariableBlockList(ListedBlocks):
    """`ListedBlocks` of different sizes; `PerHead` gives heads blocks of their own sizes.

    Attributes:
        cu_q: boundaries of the query blocks, from 0 to the stream's length.
        cu_k: boundaries of the key blocks, likewise.
        blocks: see `ListedBlocks`.
    """

    cu_q: IntArray
    cu_k: IntArray
    blocks: IntArray

    def __post_init__(self) -> None:
        self._take(self.blocks)
        for name in ("cu_q", "cu_k"):
            object.__setattr__(self, name, check_cu_seqlens(getattr(self, name)))
        num_q, num_k = len(self.cu_q) - 1, len(self.cu_k) - 1
        if self.cu_q[-1] != self.cu_k[-1] or self.blocks.shape[1] != num_q or num_k < 1:
            raise PlanError(
                f"the blocks of queries and keys hold {self.cu_q[-1]} and {self.cu_k[-1]} tokens, "
                f"and {self.blocks.shape[1]} of {num_q} query blocks are listed; both sides hold "
                f"the stream, and each query block has its list"
            )
        if self.blocks.size and self.blocks.max() >= num_k:
            raise PlanError(f"key block {self.blocks.max()} is listed, the last is {num_k - 1}")

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        check_length("blocks", int(self.cu_q[-1]), seq_len)

    def _q_block(self, q: IntArray) -> IntArray:
        return _block_of(self.cu_q, q)

    def _k_block(self, k: IntArray) -> IntArray:
        return _block_of(self.cu_k, k)

    def _keys_of(self, k_block: IntArray) -> tuple[IntArray, IntArray]:
        return self.cu_k[k_block], self.cu_k[k_block + 1]


def listed_blocks(chosen: BoolArray) -> IntArray:
    """Turn a bool [heads, query blocks, key blocks] into the lists that `ListedBlocks` takes."""
    width = int(chosen.sum(axis=2).max(initial=0))
    listed = np.full((*chosen.shape[:2], width), -1, dtype=np.int64)
    head, row, block = np.nonzero(chosen)
    place = np.cumsum(chosen, axis=2)[head, row, block] - 1
    listed[head, row, place] = block
    return listed


def _block_of(cu: IntArray, positions: IntArray) -> IntArray:
    found = np.searchsorted(cu, positions, side="right") - 1
    return np.asarray(found, dtype=np.int64)
