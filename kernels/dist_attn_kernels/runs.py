"""Tiles as runs, and the entries of tables that are written from them.

Most masks list tiles in runs: of a query block all key blocks up to the diagonal, or each so
manieth of them. Each head has an order of its own for its key blocks, in which such runs are
intervals.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_attn_kernels.intervals import IntArray, members, starts
from dist_attn_kernels.lists import FULL, Tiles, num_blocks

Int32Array = npt.NDArray[np.int32]
#: Mean entries of a run from which runs are copied one by one.
LONG_RUN = 128


@dataclass(frozen=True, eq=False)
class TileRuns:
    """The tiles of 64x64 that are not empty, of the heads that differ.

    Attributes:
        q_len: queries.
        k_len: keys.
        heads_per_kv: mask heads that share a key/value head of the mask.
        group_of: int64 [mask's key/value heads], which group of heads each is; group g are the
            heads from g * heads_per_kv.
        key_of_place: int64 [heads, key blocks], each head's order of its key blocks.
        full: int64 [n, 2], ascending disjoint runs of full tiles: intervals of places on a line
            where place p of query block q of head h is (h * query blocks + q) * key blocks + p.
        partial: head, query block, key block and kind of each other tile.
        intervals: int32 [1 or heads, 2 or 4, q_len]; None: every key.
        bits: int32 [n, 64, 2], or None.
    """

    q_len: int
    k_len: int
    heads_per_kv: int
    group_of: IntArray
    key_of_place: IntArray
    full: IntArray
    partial: tuple[IntArray, IntArray, IntArray, IntArray]
    intervals: Int32Array | None = None
    bits: Int32Array | None = None

    @property
    def num_heads(self) -> int:
        """Heads that differ."""
        return len(self.key_of_place)

    @property
    def num_q(self) -> int:
        """Query blocks."""
        return num_blocks(self.q_len)

    @property
    def num_k(self) -> int:
        """Key blocks."""
        return num_blocks(self.k_len)

    @functools.cached_property
    def key_blocks(self) -> Int32Array:
        """The key blocks of all places, head after head."""
        return self.key_of_place.reshape(-1).astype(np.int32)

    @functools.cached_property
    def times(self) -> IntArray:
        """How many mask heads each head stands for."""
        groups = np.bincount(self.group_of, minlength=self.num_heads // self.heads_per_kv)
        return np.repeat(groups, self.heads_per_kv)

    @functools.cached_property
    def num_tiles(self) -> int:
        """Tiles of all mask heads."""
        head = self.full[:, 0] // (self.num_q * self.num_k)
        full = (self.times[head] * (self.full[:, 1] - self.full[:, 0])).sum()
        return int(full + self.times[self.partial[0]].sum())

    def tiles(self) -> Tiles:
        """Write out every tile of every mask head: for tests, and for what takes `Tiles`."""
        line = members(self.full)
        row, place = line // self.num_k, line % self.num_k
        head, q_block = row // self.num_q, row % self.num_q
        full = (head, q_block, self.key_of_place[head, place], np.full(len(line), FULL))
        every = [np.concatenate(x) for x in zip(full, self.partial, strict=True)]
        columns: list[list[IntArray]] = [[], [], [], []]
        per_kv = self.heads_per_kv
        for kv_head, group in enumerate(self.group_of.tolist()):
            of = every[0] // per_kv == group
            columns[0].append(every[0][of] + (kv_head - group) * per_kv)
            for column, x in zip(columns[1:], every[1:], strict=True):
                column.append(x[of])
        heads, q_blocks, k_blocks, kinds = (torch.from_numpy(np.concatenate(c)) for c in columns)
        intervals = None if self.intervals is None else self.all_intervals()
        bits = None if self.bits is None else torch.from_numpy(self.bits)
        num_heads = len(self.group_of) * per_kv
        lengths = self.q_len, self.k_len
        return Tiles(*lengths, num_heads, heads, q_blocks, k_blocks, kinds, intervals, bits)

    def all_intervals(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the intervals of every mask head, or of all together."""
        if self.intervals is None:
            every = torch.zeros(1, 2, self.q_len, dtype=torch.int32)
            every[:, 1] = self.k_len
            return every.to(device)
        found = to_device(self.intervals, device)
        if len(found) == 1:
            return found
        per_kv = self.heads_per_kv
        of = (self.group_of[:, None] * per_kv + np.arange(per_kv)).reshape(-1)
        if np.array_equal(of, np.arange(len(found))):
            return found
        return found[torch.from_numpy(of).to(device)]


def to_device(x: npt.NDArray[np.integer], device: torch.device | str) -> Tensor:
    """Put integers on a device as int32."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)).to(device)


@dataclass(frozen=True)
class Items:
    """Items of a table and what each visits: masked entries one by one, full ones in runs.

    Attributes:
        num: how many items there are; those without entries are left out.
        masked: the item of each masked entry, ascending.
        full: the item of each run, ascending.
        length: entries of each run.
    """

    num: int
    masked: IntArray
    full: IntArray
    length: IntArray

    def counts(self) -> tuple[IntArray, IntArray]:
        """Entries and masked entries of each item."""
        masked = np.bincount(self.masked, minlength=self.num)
        full = np.bincount(self.full, self.length, minlength=self.num).astype(np.int64)
        return masked + full, masked

    def write(
        self, source: Int32Array, first: IntArray, masked: IntArray, lead: IntArray
    ) -> tuple[Int32Array, IntArray]:
        """Write the entries of all items: masked ones, a gap, and the runs.

        Args:
            source: what runs are copied from.
            first: where in it each run begins.
            masked: the masked entries.
            lead: masked entries of each item and its gap.

        Returns:
            The entries, and the place of each masked one. What stands in gaps is any number.
        """
        segment_item = np.concatenate([np.arange(self.num), self.full])
        # The leading segment of an item comes before its runs.
        order = np.argsort(segment_item, kind="stable")
        length = np.concatenate([lead, self.length])[order]
        at = starts(length)
        from_here = np.concatenate([np.zeros(self.num, np.int64), first])[order]
        entries = _copied(source, from_here, length)
        lead_at = at[np.searchsorted(segment_item[order], np.arange(self.num))]
        inside = np.arange(len(self.masked)) - np.searchsorted(self.masked, self.masked)
        place = lead_at[self.masked] + inside
        entries[place] = masked
        return entries, place


def _copied(source: Int32Array, begin: IntArray, length: IntArray) -> Int32Array:
    """Put slices of an array one after another."""
    total = int(length.sum())
    at = starts(length)
    if total > LONG_RUN * len(length):
        entries = np.empty(total, dtype=np.int32)
        for to, first, size in zip(at.tolist(), begin.tolist(), length.tolist(), strict=True):
            entries[to : to + size] = source[first : first + size]
        return entries
    index = np.arange(total, dtype=np.int32)
    index += np.repeat((begin - at).astype(np.int32), length)
    return np.asarray(np.take(source, index, mode="clip"))
