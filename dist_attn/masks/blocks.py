"""Rules by blocks of keys that are no interval: each so manieth, or listed ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.layout import IntArray
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
