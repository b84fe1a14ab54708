"""The tables for the block-sparse kernels say what the mask says, for any tokens on either side."""

import numpy as np
import pytest

from dist_attn.attention import block_lists
from dist_attn.attention.block_lists import Tables, list_tiles
from dist_attn.masks import Causal, patterns
from dist_attn_kernels.lists import BITS, BLOCK, FULL, INTERVAL
from tests.mask_zoo import NUM_HEADS, SEQ_LEN, zoo

ZOO = zoo()
RNG = np.random.default_rng(2)


def dense_of(tables: Tables, head: int, num_q: int, num_k: int) -> np.ndarray:
    """Walk the tables as the kernels do."""
    allowed = np.zeros((num_q + BLOCK, num_k + BLOCK), dtype=bool)
    mask_head = head if tables.per_head else 0
    seen = set()
    for h, row, key, kind in zip(*tables.tiles, strict=True):
        if h != mask_head:
            continue
        assert (row, key) not in seen
        seen.add((row, key))
        q = np.arange(row * BLOCK, row * BLOCK + BLOCK)
        k = np.arange(key * BLOCK, key * BLOCK + BLOCK)
        if kind == FULL:
            tile = np.ones((BLOCK, BLOCK), dtype=bool)
        elif kind == INTERVAL:
            table = tables.intervals[mask_head if len(tables.intervals) > 1 else 0]
            bounds = table[:, np.minimum(q, num_q - 1)][:, :, None]
            tile = (bounds[0] <= k) & (k < bounds[1])
            if len(bounds) == 4:
                tile |= (bounds[2] <= k) & (k < bounds[3])
        else:
            rows = tables.bits[kind - BITS].astype("<i4").view(np.uint8)
            tile = np.unpackbits(rows, axis=1, bitorder="little").astype(bool)
        allowed[row * BLOCK : (row + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK] = tile
    if tables.intervals is not None:
        assert not allowed[:, num_k:].any()
    return allowed[:num_q, :num_k]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("scattered", [False, True])
def test_tables_say_what_the_mask_says(name, scattered):
    mask = ZOO[name]
    q = k = np.arange(SEQ_LEN)
    if scattered:
        q, k = (np.sort(RNG.choice(SEQ_LEN, n, replace=False)) for n in (70, 81))
    for heads in (range(NUM_HEADS), range(1, 3)):
        tables = list_tiles(mask, (q, k), heads)
        for i, head in enumerate(heads):
            got = dense_of(tables, i, len(q), len(k))
            np.testing.assert_array_equal(got, mask.materialize(SEQ_LEN, head)[np.ix_(q, k)])


def test_nothing_to_see_gives_no_tables():
    assert list_tiles(Causal(), (np.arange(10), np.arange(10, 20)), range(2)) is None


def test_tiles_of_equal_bits_share_them():
    mask = patterns.s2(4096, 64, 4, 4, 2)
    positions = np.arange(4096)
    tables = list_tiles(mask, (positions, positions), range(2))
    assert len(tables.bits) == 2  # the diagonal's triangle, once per head
    partial = tables.tiles[3] >= BITS
    assert partial.sum() == 2 * 64


@pytest.mark.parametrize("collide", [False, True])
def test_different_rows_are_told_apart_even_if_their_hashes_are_not(collide, monkeypatch):
    if collide:
        monkeypatch.setattr(block_lists, "_hash", lambda rows: np.zeros(len(rows), np.uint64))
    rows = RNG.integers(0, 2, (50, 16)).astype(np.uint8)[RNG.integers(0, 9, 200)]
    different, index = block_lists._different(rows)
    np.testing.assert_array_equal(different[index], rows)
    assert len(different) == len(np.unique(rows, axis=0))
