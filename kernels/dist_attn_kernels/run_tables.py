"""Block lists from runs of tiles, on the host, without sorting the tiles.

It takes little longer than to write the tables, which follow from runs by a few operations on
intervals. What is not in runs, tiles that are cut and runs of one half of a pair, is listed one by
one. Heads of the same tiles share them.
"""

from __future__ import annotations

import numpy as np
import torch

from dist_attn_kernels.intervals import (
    IntArray,
    ascending,
    members,
    minus,
    overlap,
    size_of_union,
    starts,
)
from dist_attn_kernels.lists import (
    EMPTY,
    FULL,
    HEAD_SHIFT,
    HEADS_TOGETHER,
    NARROW_FROM,
    BlockLists,
    NarrowLists,
)
from dist_attn_kernels.runs import Int32Array, Items, TileRuns, to_device

#: Tables of one kind on the host: items, entries and kinds.
Tables = tuple[IntArray, Int32Array, IntArray]


def lists_from_runs(runs: TileRuns, device: torch.device | str = "cpu") -> BlockLists:
    """Build the kernels' tables and put them on a device; see `build_lists`."""
    columns = _Columns(runs)
    rows, row_blocks, row_kinds = _rows(runs)
    cols, col_entries, col_kinds = columns.wide()
    distinct_tiles = int((runs.full[:, 1] - runs.full[:, 0]).sum()) + len(runs.partial[0])
    narrow = None
    if max(row_blocks.size, col_entries.size) * 2 > NARROW_FROM * distinct_tiles:
        narrow = NarrowLists(
            *(to_device(x, device) for x in (*_narrow_rows(runs), *columns.narrow()))
        )
    num_kv = len(runs.group_of)
    num_heads = num_kv * runs.heads_per_kv
    with_keys = np.zeros(runs.num_heads * runs.num_q, dtype=bool)
    with_keys[runs.full[:, 0] // runs.num_k] = True
    with_keys[runs.partial[0] * runs.num_q + runs.partial[1]] = True
    return BlockLists(
        q_len=runs.q_len,
        k_len=runs.k_len,
        num_mask_heads=num_heads,
        num_mask_kv_heads=num_kv,
        rows=to_device(rows, device),
        row_blocks=to_device(row_blocks, device),
        row_kinds=to_device(row_kinds, device),
        cols=to_device(cols, device),
        col_entries=to_device(col_entries, device),
        col_kinds=to_device(col_kinds, device),
        intervals=runs.all_intervals(device),
        bits=None if runs.bits is None else to_device(runs.bits, device),
        num_tiles=runs.num_tiles,
        has_empty_rows=not with_keys.all(),
        has_empty_cols=not columns.listed.all(),
        narrow=narrow,
    )


def _rows(runs: TileRuns) -> Tables:
    """Rows of two query blocks, two key blocks to a step."""
    num_k, row_tiles = runs.num_k, -(-runs.num_q // 2)
    line = runs.full[:, 0] // num_k
    head, q_block = line // runs.num_q, line % runs.num_q
    # The same runs on the lines of row tiles, upper and lower halves.
    here = runs.full + ((head * row_tiles + q_block // 2 - line) * num_k)[:, None]
    upper, lower = here[q_block % 2 == 0], here[q_block % 2 == 1]
    alone = runs.num_q % 2 == 1
    if alone:
        # Where the second half holds no query nothing is stored from it.
        last = here[q_block == runs.num_q - 1]
        lower = ascending(*np.concatenate([lower, last]).T)
    both = overlap(upper, lower)
    cut = [_places(runs, minus(x, both), row_tiles) for x in (upper, lower)]
    p_head, p_q, p_key, p_kind = runs.partial
    p_row, p_half = p_head * row_tiles + p_q // 2, p_q % 2
    row = np.concatenate([cut[0][0], cut[1][0], p_row])
    key = np.concatenate([cut[0][1], cut[1][1], p_key])
    half = np.repeat([0, 1], [len(cut[0][0]), len(cut[1][0])])
    half, kind = np.concatenate([half, p_half]), np.concatenate([np.full(len(half), FULL), p_kind])
    if alone:
        last_ones = np.flatnonzero(p_q == runs.num_q - 1)
        row, key = np.append(row, p_row[last_ones]), np.append(key, p_key[last_ones])
        half = np.append(half, np.ones(len(last_ones), np.int64))
        kind = np.append(kind, p_kind[last_ones])
    row, key, pair = _paired(row * num_k + key, half, kind, num_k)
    # Masked entries of one half together, so that a half can skip a step.
    rank = np.where(pair[:, 1] == EMPTY, 0, np.where(pair[:, 0] == EMPTY, 2, 1))
    order = np.argsort((row * 4 + rank) * num_k + key)
    row, key, pair = row[order], key[order], pair[order]
    of_both = both[:, 0] // num_k
    items = Items(runs.num_heads * row_tiles, row, of_both, both[:, 1] - both[:, 0])
    counts, masked = items.counts()
    odd = counts % 2
    place = both[:, 0] - of_both * num_k + of_both // row_tiles * num_k
    blocks, at = items.write(runs.key_blocks, place, key, masked + odd)
    # An odd row gets one entry of nothing behind the masked ones. It points at its neighbour's
    # block: a load in bounds that is in use anyway.
    first = starts(counts + odd)
    gaps = (first + masked)[odd == 1]
    blocks[gaps] = blocks[gaps ^ 1]
    steps, masked_steps = (counts + odd) // 2, (masked + odd + 1) // 2
    first_kind = starts(masked_steps)
    kinds = np.full((int(masked_steps.sum()) * 2, 2), FULL, dtype=np.int64)
    kinds[first_kind[row] * 2 + at - first[row]] = pair
    kinds[(first_kind * 2 + masked)[odd == 1]] = EMPTY
    step_kinds = kinds.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)
    every = np.arange(items.num)
    columns = [every // row_tiles, every % row_tiles, first // 2, steps, first_kind, masked_steps]
    table = _for_all_heads(runs, np.stack(columns, 1)[counts > 0])
    return table[_longest_first(table[:, 0], table[:, 3])], blocks.reshape(-1, 2), step_kinds


def _narrow_rows(runs: TileRuns) -> Tables:
    num_q, num_k = runs.num_q, runs.num_k
    p_head, p_q, p_key, p_kind = runs.partial
    row = p_head * num_q + p_q
    order = np.argsort(row * num_k + p_key)
    of_full = runs.full[:, 0] // num_k
    length = runs.full[:, 1] - runs.full[:, 0]
    items = Items(runs.num_heads * num_q, row[order], of_full, length)
    counts, masked = items.counts()
    place = runs.full[:, 0] - of_full * num_k + of_full // num_q * num_k
    blocks, _ = items.write(runs.key_blocks, place, p_key[order], masked)
    every = np.arange(items.num)
    columns = [every // num_q, every % num_q, starts(counts), counts, starts(masked), masked]
    table = _for_all_heads(runs, np.stack(columns, 1)[counts > 0])
    return table[_longest_first(table[:, 0], table[:, 3])], blocks, p_kind[order]


class _Columns:
    """The same tiles by columns: of each place of each head, runs of query blocks."""

    def __init__(self, runs: TileRuns) -> None:
        self.runs = runs
        num_q, num_k, per_kv = runs.num_q, runs.num_k, runs.heads_per_kv
        # Tiles that are in a row and not in the one before begin a run of their column; those that
        # were in the row before and are not in it end one. A head has one row more than blocks.
        lines = num_q + 1
        rows = runs.full + (runs.full[:, 0] // (num_q * num_k) * num_k)[:, None]
        begin, end = (
            self._by_place(members(x), lines)
            for x in (minus(rows, rows + num_k), minus(rows + num_k, rows))
        )
        place = begin // lines
        head = place // num_k
        self.column = head // per_kv * num_k + runs.key_of_place[head, place % num_k]
        self.in_group = head % per_kv
        self.begin, self.end = begin - place * lines, end - place * lines
        p_head, self.p_q, p_key, self.p_kind = runs.partial
        self.p_column, self.p_in_group = p_head // per_kv * num_k + p_key, p_head % per_kv
        self.num_columns = runs.num_heads // per_kv * num_k
        self.counts = np.bincount(self.p_column, minlength=self.num_columns)
        length = np.bincount(self.column, self.end - self.begin, minlength=self.num_columns)
        self.counts += length.astype(np.int64)
        self.listed = self.counts > 0

    def _by_place(self, cells: IntArray, lines: int) -> IntArray:
        """Order tiles by head and place, then by row: (head * key blocks + place) * lines + row."""
        num_k = self.runs.num_k
        row, place = cells // num_k, cells % num_k
        head = row // lines
        return np.sort((head * num_k + place) * lines + row - head * lines)

    def wide(self) -> Tables:
        """Two key blocks to an item."""
        runs = self.runs
        num_q, per_kv = runs.num_q, runs.heads_per_kv
        item, side, pairs = self._pairs()
        # From the last query to the first.
        line = (item[self.column] * per_kv + self.in_group) * num_q + num_q
        spans = [
            ascending((line - self.end)[of], (line - self.begin)[of])
            for of in (side[self.column] == 0, side[self.column] == 1)
        ]
        both = overlap(*spans)
        cut = [members(minus(x, both)) for x in spans]
        p_line = (item[self.p_column] * per_kv + self.p_in_group) * num_q + num_q - 1 - self.p_q
        sides = np.repeat([0, 1], [len(cut[0]), len(cut[1])])
        kinds = np.concatenate([np.full(len(sides), FULL), self.p_kind])
        at = np.concatenate([*cut, p_line])
        sides = np.concatenate([sides, side[self.p_column]])
        row, position, pair = _paired(at, sides, kinds, num_q)
        table, entries = self._write(len(pairs), row, position, both)
        table = _for_all_heads(runs, np.concatenate([pairs, table], axis=1), by_kv=True)
        return table[_longest_first(table[:, 0] // HEADS_TOGETHER, table[:, 4])], entries, pair

    def narrow(self) -> Tables:
        """One key block to an item, which stands twice."""
        runs = self.runs
        num_q, num_k, per_kv = runs.num_q, runs.num_k, runs.heads_per_kv
        line = (self.column * per_kv + self.in_group) * num_q + num_q
        spans = ascending(line - self.end, line - self.begin)
        p_line = (self.p_column * per_kv + self.p_in_group) * num_q + num_q - 1 - self.p_q
        order = np.argsort(p_line)
        row, position = p_line[order] // num_q, p_line[order] % num_q
        table, entries = self._write(self.num_columns, row, position, spans)
        head, block = np.divmod(np.arange(self.num_columns), num_k)
        table = np.concatenate([np.stack([head, block, block], 1), table], axis=1)[self.listed]
        kinds = self.p_kind[order]
        return _for_all_heads(runs, table, by_kv=True), entries, np.stack([kinds, kinds], 1)

    def _write(
        self, num: int, row: IntArray, position: IntArray, full: IntArray
    ) -> tuple[IntArray, Int32Array]:
        """Write items of which each has a line of query blocks for every head of its group."""
        num_q, per_kv = self.runs.num_q, self.runs.heads_per_kv
        full_row = full[:, 0] // num_q
        items = Items(num, row // per_kv, full_row // per_kv, full[:, 1] - full[:, 0])
        counts, masked = items.counts()
        # From the last query to the first, with the head inside its group.
        entry = np.arange(num_q - 1, -1, -1) | np.arange(per_kv)[:, None] << HEAD_SHIFT
        source = entry.reshape(-1).astype(np.int32)
        first = full[:, 0] - full_row * num_q + full_row % per_kv * num_q
        entries, _ = items.write(source, first, entry[row % per_kv, position], masked)
        return np.stack([starts(counts), counts, starts(masked), masked], axis=1), entries

    def _pairs(self) -> tuple[IntArray, IntArray, IntArray]:
        """Put every listed key block into a column of two, as `lists._pair_key_blocks` does.

        Returns:
            Item and side of each key block, and [items, 3]: head and the two key blocks.
        """
        num_q, num_k = self.runs.num_q, self.runs.num_k
        listed = np.flatnonzero(self.listed)
        head = listed // num_k
        last = np.full(self.num_columns, -1)
        np.maximum.at(last, self.column, self.end - 1)
        np.maximum.at(last, self.p_column, self.p_q)
        widest = int(self.counts.max(initial=0)) + 1
        likeness = (num_q - last[listed]) * widest + (widest - self.counts[listed])
        order = np.argsort(head * ((num_q + 1) * widest) + likeness, kind="stable")
        per_head = np.bincount(head)
        inside = np.arange(len(order)) - np.repeat(starts(per_head), per_head)
        alike, side = np.zeros((2, self.num_columns), dtype=np.int64)
        alike[listed[order]] = np.repeat(starts((per_head + 1) // 2), per_head) + inside // 2
        side[listed[order]] = inside % 2
        near = np.zeros_like(alike)
        _, near[listed] = np.unique(head * num_k + listed % num_k // 2, return_inverse=True)
        item = alike
        if self._union(near) <= self._union(alike):
            item = near
            first = np.ones(len(listed), dtype=bool)
            first[1:] = near[listed[1:]] != near[listed[:-1]]
            side[listed] = ~first
        pairs = np.full((int(item[listed].max(initial=-1)) + 1, 3), -1)
        pairs[item[listed], 0] = head
        pairs[item[listed], side[listed] + 1] = listed % num_k
        pairs[:, 2] = np.where(pairs[:, 2] < 0, pairs[:, 1], pairs[:, 2])
        return item, side, pairs

    def _union(self, item: IntArray) -> int:
        """Entries of columns that are put together so."""
        num_q, per_kv = self.runs.num_q, self.runs.heads_per_kv
        line = (item[self.column] * per_kv + self.in_group) * num_q
        p_line = (item[self.p_column] * per_kv + self.p_in_group) * num_q + self.p_q
        return size_of_union(
            np.concatenate([line + self.begin, p_line]),
            np.concatenate([line + self.end, p_line + 1]),
        )


def _places(runs: TileRuns, cut: IntArray, row_tiles: int) -> tuple[IntArray, IntArray]:
    """Row tile and key block of single tiles on the lines of row tiles."""
    line = members(cut)
    row = line // runs.num_k
    return row, runs.key_of_place[row // row_tiles, line - row * runs.num_k]


def _paired(
    place: IntArray, side: IntArray, kind: IntArray, width: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Put the two sides of each place together: line, place on it and both kinds, in order."""
    keys, inverse = np.unique(place, return_inverse=True)
    pair = np.full((len(keys), 2), EMPTY, dtype=np.int64)
    pair[inverse, side] = kind
    return keys // width, keys % width, pair


def _for_all_heads(runs: TileRuns, table: IntArray, *, by_kv: bool = False) -> IntArray:
    """Repeat the items of a head, which stands first, for every mask head of the same tiles."""
    per_kv = 1 if by_kv else runs.heads_per_kv
    if np.array_equal(runs.group_of, np.arange(runs.num_heads // runs.heads_per_kv)):
        return table
    bounds = np.searchsorted(table[:, 0], np.arange(runs.num_heads + 1))
    repeated = []
    for kv_head, group in enumerate(runs.group_of.tolist()):
        some = table[bounds[group * per_kv] : bounds[(group + 1) * per_kv]].copy()
        some[:, 0] += (kv_head - group) * per_kv
        repeated.append(some)
    return np.concatenate(repeated)


def _longest_first(head: IntArray, length: IntArray) -> IntArray:
    return np.argsort(head * (int(length.max(initial=0)) + 1) - length, kind="stable")
