"""Tiles against masks written out element by element."""

from __future__ import annotations

import pytest
import torch

from dist_attn_kernels import rules
from dist_attn_kernels.lists import EMPTY, FULL, ROW_QUERIES, Tiles, build_lists
from tests.unit.kernels import block_sparse_cases as cases

NAMES = ["causal", "window", "documents", "s2", "s2_128_documents", "mixed", "random", "sparse"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [64, 200, 385])
def test_area_counts_the_mask(name: str, length: int) -> None:
    tiles = cases.named_tiles(name, length, 2)
    assert rules.area(tiles).tolist() == rules.dense_mask(tiles).sum((1, 2)).tolist()


def test_s2_by_definition() -> None:
    length, heads, local, stride = 640, 3, 2, 4
    tiles = rules.s2_tiles(length, heads, local_blocks=local, stride_blocks=stride)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    near = q // 64 - k // 64 < local
    for head in range(heads):
        strided = (k // 64 + head) % stride == stride - 1
        want = (near | strided) & (k <= q)
        assert torch.equal(rules.dense_mask(tiles)[head], want)


def test_documents_and_window_by_definition() -> None:
    length, cu = 300, torch.tensor([0, 0, 7, 150, 150, 300])
    bounds = rules.causal_intervals(length, cu_seqlens=cu, window=70)
    mask = rules.dense_mask(rules.tiles_from_intervals(bounds, length))[0]
    document = torch.repeat_interleave(torch.arange(5), torch.diff(cu))
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    want = (document[q] == document[k]) & (k <= q) & (q - k <= 70)
    assert torch.equal(mask, want)


def test_sink_and_window_as_two_intervals() -> None:
    length = 400
    window = rules.causal_intervals(length, window=90)
    sink = torch.stack([torch.zeros(length), (torch.arange(length) + 1).clamp(max=5)])
    bounds = torch.cat([sink[None].to(torch.int32), window], 1)
    tiles = rules.tiles_from_intervals(bounds, length)
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]
    want = (k <= q) & ((q - k <= 90) | (k < 5))
    assert torch.equal(rules.dense_mask(tiles)[0], want)
    assert rules.area(tiles).tolist() == [int(want.sum())]


@pytest.mark.parametrize("name", NAMES)
def test_lists_hold_every_tile_once(name: str) -> None:
    """Both tables name exactly the tiles that went in, masked steps first, longest items first."""
    length = 700
    tiles = cases.named_tiles(name, length, 2)
    lists = build_lists(tiles)
    coords = (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds)
    want = {(h, q, k): kind for h, q, k, kind in zip(*(t.tolist() for t in coords), strict=True)}
    last = -(-length // 64) - 1
    rows: dict = {}
    for head, tile, first, steps, first_kind, masked in lists.rows.tolist():
        for step in range(steps):
            blocks = lists.row_blocks[first + step].tolist()
            kinds = lists.row_kinds[first_kind + step].tolist() if step < masked else [FULL] * 4
            for half in range(2):
                for side in range(2):
                    kind = kinds[2 * half + side]
                    q_block = tile * (ROW_QUERIES // 64) + half
                    if kind != EMPTY and q_block <= last:
                        assert (head, q_block, blocks[side]) not in rows
                        rows[head, q_block, blocks[side]] = kind
    assert rows == want
    cols: dict = {}
    for head, block0, block1, first, count, first_kind, masked in lists.cols.tolist():
        for i in range(count):
            kinds = lists.col_kinds[first_kind + i].tolist() if i < masked else [FULL] * 2
            for block, kind in zip((block0, block1), kinds, strict=True):
                if kind != EMPTY:
                    key = (head, int(lists.col_entries[first + i]), block)
                    assert key not in cols
                    cols[key] = kind
    assert cols == want
    lengths = lists.rows[lists.rows[:, 0] == 0, 3]
    assert (lengths.diff() <= 0).all()


@pytest.mark.parametrize("name", ["random", "sparse"])
def test_single_blocks_where_neighbours_have_little_in_common(name: str) -> None:
    """These tables name every tile once as well, masked ones first, and nothing else."""
    tiles = cases.named_tiles(name, 1900, 2)
    lists = build_lists(tiles)
    assert lists.narrow is not None
    assert 2 * lists.row_blocks.numel() > 1.5 * lists.num_tiles
    coords = (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds)
    want = {(h, q, k): kind for h, q, k, kind in zip(*(t.tolist() for t in coords), strict=True)}
    table, blocks, kinds = lists.walked_rows
    rows = {}
    for head, q_block, first, steps, first_kind, masked in table.tolist():
        assert steps
        for step in range(steps):
            kind = int(kinds[first_kind + step]) if step < masked else FULL
            rows[head, q_block, int(blocks[first + step])] = kind
    assert rows == want
    assert len(blocks) == len(want)
    assert (table[table[:, 0] == 1, 3].diff() <= 0).all()
    table, entries, kinds = lists.walked_cols
    cols = {}
    for head, block, twin, first, count, first_kind, masked in table.tolist():
        assert block == twin
        assert count
        for i in range(count):
            kind = kinds[first_kind + i].tolist() if i < masked else [FULL, FULL]
            cols[head, int(entries[first + i]), block] = kind[0]
            assert kind[0] == kind[1]
    assert cols == want
    assert len(entries) == len(want)


@pytest.mark.parametrize("name", ["causal", "window", "s2", "s2_128_documents"])
def test_neighbours_that_agree_share_items(name: str) -> None:
    assert build_lists(cases.named_tiles(name, 4096, 2)).narrow is None


def test_strided_columns_are_paired_with_each_other() -> None:
    """A pair of unlike columns would double the backward's work on strided blocks."""
    tiles = rules.s2_tiles(64 * 128, 1, local_blocks=4, stride_blocks=8)
    lists = build_lists(tiles)
    visited = 2 * int(lists.cols[:, 4].sum())
    assert visited < 1.25 * lists.num_tiles


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"heads": torch.tensor([1])}, "heads"),
        ({"k_blocks": torch.tensor([2])}, "k_blocks"),
        ({"kinds": torch.tensor([3])}, "kinds"),
        ({"intervals": torch.zeros(1, 3, 100, dtype=torch.int32)}, "intervals"),
    ],
)
def test_refusals(change: dict, word: str) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    good = {"heads": zero, "q_blocks": zero, "k_blocks": zero, "kinds": zero + FULL}
    with pytest.raises(ValueError, match=word):
        build_lists(Tiles(100, 100, 1, **(good | change)))
