"""Read the tables of block lists as the kernels walk them, back into a mask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_attn_kernels.lists import BITS, BLOCK, EMPTY, FULL, HEAD_SHIFT, INTERVAL, BlockLists

Tile = tuple[int, int, int, int]


def walk_rows(lists: BlockLists, *, narrow: bool = False) -> np.ndarray:
    """bool [mask heads, queries, keys] of the tables of the forward."""
    return _dense(lists, _narrow_rows(lists) if narrow else _rows(lists))


def walk_cols(lists: BlockLists, *, narrow: bool = False) -> np.ndarray:
    """bool [mask heads, queries, keys] of the tables of the backward."""
    return _dense(lists, _cols(lists, narrow))


def entries_of_rows(lists: BlockLists) -> dict[tuple[int, int], tuple[int, list[Tile]]]:
    """The masked steps and the tiles of each item of the forward."""
    found: dict[tuple[int, int], list[Tile]] = {}
    for tile in _rows(lists):
        if tile[3] != EMPTY:
            found.setdefault((tile[0], tile[1] // 2), []).append(tile)
    masked = {(row[0], row[1]): row[5] for row in lists.rows.tolist()}
    return {item: (masked[item], sorted(tiles)) for item, tiles in found.items()}


def _rows(lists: BlockLists) -> Iterator[Tile]:
    last_half = -(-lists.q_len // BLOCK)
    for head, tile, first, steps, first_kind, masked in lists.rows.tolist():
        for step in range(steps):
            kinds = [FULL] * 4
            if step < masked:
                kinds = lists.row_kinds[first_kind + step].tolist()
            for i in range(2):
                block = int(lists.row_blocks[first + step, i])
                assert 0 <= block * BLOCK < lists.k_len
                for half in range(2):
                    if tile * 2 + half < last_half:
                        yield head, tile * 2 + half, block, kinds[half * 2 + i]


def _narrow_rows(lists: BlockLists) -> Iterator[Tile]:
    tables = lists.narrow
    assert tables is not None
    for head, row, first, steps, first_kind, masked in tables.rows.tolist():
        kinds = [*tables.row_kinds[first_kind : first_kind + masked].tolist()]
        kinds += [FULL] * (steps - masked)
        blocks = tables.row_blocks[first : first + steps].tolist()
        for block, kind in zip(blocks, kinds, strict=True):
            yield head, row, block, kind


def _cols(lists: BlockLists, narrow: bool) -> Iterator[Tile]:
    cols, entries, kinds = lists.cols, lists.col_entries, lists.col_kinds
    if narrow:
        assert lists.narrow is not None
        cols, entries, kinds = lists.narrow.cols, lists.narrow.col_entries, lists.narrow.col_kinds
    per_kv = lists.num_mask_heads // lists.num_mask_kv_heads
    for head, a, b, first, count, first_kind, masked in cols.tolist():
        for i in range(count):
            entry = int(entries[first + i])
            here = kinds[first_kind + i].tolist() if i < masked else [FULL, FULL]
            q_block, q_head = entry & ((1 << HEAD_SHIFT) - 1), entry >> HEAD_SHIFT
            yield head * per_kv + q_head, q_block, a, here[0]
            if b != a:
                yield head * per_kv + q_head, q_block, b, here[1]


def _dense(lists: BlockLists, tiles: Iterator[Tile]) -> np.ndarray:
    num_q, num_k = (-(-n // BLOCK) * BLOCK for n in (lists.q_len, lists.k_len))
    dense = np.zeros((lists.num_mask_heads, num_q, num_k), dtype=bool)
    seen = set()
    intervals = lists.intervals.numpy()
    for head, q_block, k_block, kind in tiles:
        if kind == EMPTY:
            continue
        assert (head, q_block, k_block) not in seen, "no tile is visited twice"
        seen.add((head, q_block, k_block))
        q, k = (np.arange(b * BLOCK, b * BLOCK + BLOCK) for b in (q_block, k_block))
        tile = np.ones((BLOCK, BLOCK), dtype=bool)
        if kind == INTERVAL:
            table = intervals[head if len(intervals) > 1 else 0]
            bounds = table[:, np.minimum(q, lists.q_len - 1)][:, :, None]
            tile = (bounds[0] <= k) & (k < bounds[1])
            if len(bounds) == 4:
                tile |= (bounds[2] <= k) & (k < bounds[3])
        elif kind >= BITS:
            assert lists.bits is not None
            rows = lists.bits[kind - BITS].numpy().view(np.uint8)
            tile = np.unpackbits(rows, axis=1, bitorder="little").astype(bool)
        dense[head, q[0] : q[-1] + 1, k[0] : k[-1] + 1] = tile
    # Keys that are not there must not be seen; what queries that are not there see is not stored.
    assert not dense[:, : lists.q_len, lists.k_len :].any()
    return dense[:, : lists.q_len, : lists.k_len]
