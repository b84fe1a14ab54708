"""Areas, tile lists and recognition of every mask agree with its elements."""

import numpy as np
import pytest

from dist_attn.errors import PlanError
from dist_attn.masks import (
    BlockCausal,
    BlockDistance,
    BlockList,
    Causal,
    DocumentPrefix,
    Documents,
    Full,
    PerHead,
    Predicate,
    StridedBlocks,
    VariableBlockList,
    Window,
    dense_form,
    patterns,
    stretches,
    tile_lists,
)
from dist_attn.masks.parts import union_over_rows
from tests.mask_zoo import CU, NUM_HEADS, SEQ_LEN, zoo

ZOO = zoo()
RNG = np.random.default_rng(1)


@pytest.mark.parametrize("name", ZOO)
def test_area_is_exact(name):
    mask = ZOO[name]
    areas = [int(mask.materialize(SEQ_LEN, h).sum()) for h in range(NUM_HEADS)]
    assert [mask.area(SEQ_LEN, h) for h in range(NUM_HEADS)] == areas
    assert mask.total_area(SEQ_LEN, NUM_HEADS) == sum(areas)
    some = np.array([3, 50, 88])
    rows = mask.materialize(SEQ_LEN, 1)[some].sum(axis=1)
    assert mask.row_areas(some, SEQ_LEN, 1).tolist() == rows.tolist()


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("scattered", [False, True])
def test_tiles_cover_the_mask_once(name, scattered):
    """Full tiles are full, what is in no tile is empty, and no tile is listed twice."""
    mask = ZOO[name]
    everything = np.arange(SEQ_LEN)
    q = np.sort(RNG.choice(SEQ_LEN, 50, replace=False)) if scattered else everything
    k = np.sort(RNG.choice(SEQ_LEN, 61, replace=False)) if scattered else everything
    q_size, k_size = 7, 5
    for head in range(NUM_HEADS):
        lists = tile_lists(mask, stretches(q, q_size), stretches(k, k_size), head)
        rows, keys, full = lists.expand()
        assert len({*zip(rows.tolist(), keys.tolist(), strict=True)}) == len(rows)
        assert lists.counts() == (full.sum(), len(full) - full.sum())
        dense = mask.materialize(SEQ_LEN, head)[np.ix_(q, k)]
        covered = np.zeros_like(dense)
        for row, key, is_full in zip(rows, keys, full, strict=True):
            tile = np.s_[row * q_size : (row + 1) * q_size, key * k_size : (key + 1) * k_size]
            covered[tile] = True
            assert dense[tile].all() or not is_full
        assert not (dense & ~covered).any()


@pytest.mark.parametrize("name", [n for n in ZOO if "documents" not in n and "predicate" not in n])
def test_most_full_tiles_are_found_and_few_empty_ones_listed(name):
    mask = ZOO[name]
    found = empty = all_full = listed = 0
    for head in range(NUM_HEADS):
        dense = mask.materialize(SEQ_LEN, head)[:88, :88]
        tiles = dense.reshape(22, 4, 22, 4).transpose(0, 2, 1, 3).reshape(22, 22, 16)
        part = stretches(np.arange(88), 4)
        rows, keys, full = tile_lists(mask, part, part, head).expand()
        found += int(full.sum())
        all_full += int(tiles.all(-1).sum())
        listed += len(rows)
        empty += int((~tiles[rows, keys].any(-1)).sum())
    assert found >= 0.5 * all_full
    assert empty <= 0.1 * listed


def test_needed_keys_are_exactly_those_that_some_query_sees():
    for mask in (m for m in ZOO.values() if m.exact_rows):
        q = np.array([5, 30, 31, 77])
        needed = np.zeros(SEQ_LEN, dtype=bool)
        for a, b in union_over_rows(mask.touched(q, q, 2), SEQ_LEN).tolist():
            needed[a:b] = True
        np.testing.assert_array_equal(needed, mask.materialize(SEQ_LEN, 2)[q].any(axis=0))


@pytest.mark.parametrize(
    ("mask", "cu", "causal"),
    [
        (Full(), [0, SEQ_LEN], False),
        (Causal(), [0, SEQ_LEN], True),
        (Documents(CU), CU, False),
        (Causal() & Documents(CU), CU, True),
        (Documents(CU) & Documents([0, 20, SEQ_LEN]) & Full(), sorted({*CU.tolist(), 20}), False),
    ],
)
def test_dense_masks_are_recognised(mask, cu, causal):
    form = dense_form(mask, SEQ_LEN)
    assert form.causal == causal
    assert set(form.cu_seqlens.tolist()) == {int(c) for c in cu}


@pytest.mark.parametrize("mask", [Window(3, 0), Causal() | Documents(CU), Causal() & Window(9, 9)])
def test_others_are_not(mask):
    assert dense_form(mask, SEQ_LEN) is None


def test_growing_windows_grow():
    def spans(seq_len):
        mask = patterns.growing_windows(seq_len, [(4, 0.0), (0, 0.5)])
        return [int(mask.materialize(seq_len, h)[-1].sum()) for h in range(2)]

    assert (spans(20), spans(80)) == ([4, 10], [4, 40])


def test_the_heads_of_s2_see_the_whole_context_together():
    mask = patterns.s2(SEQ_LEN, 4, 1, 4, 4)
    heads = [mask.materialize(SEQ_LEN, h) for h in range(4)]
    np.testing.assert_array_equal(np.any(heads, axis=0), Causal().materialize(SEQ_LEN))
    assert len({mask.pattern(h) for h in range(4)}) == 4
    assert mask.pattern(0) == mask.pattern(4)


def test_the_tiles_of_a_million_tokens_are_counted_without_being_made():
    part = stretches(np.arange(1 << 20), 128)
    causal = tile_lists(Causal(), part, part, 0)
    assert causal.counts() == (8192 * 8191 // 2, 8192)
    assert causal.nbytes() < 1 << 20


def test_the_area_of_a_million_tokens_is_exact():
    seq_len = 1 << 20
    assert Causal().area(seq_len) == seq_len * (seq_len + 1) // 2
    window = patterns.sliding_window(4096)
    assert window.area(seq_len) == 4096 * seq_len - 4096 * 4095 // 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-2, 0), "unlimited"),
        (lambda: Documents([0, 5, 3]), "ascend"),
        (lambda: DocumentPrefix([0, 5], -1), "0 tokens or more"),
        (lambda: StridedBlocks(8, 0, 2), "1 or more"),
        (lambda: BlockDistance(4, 1, 2), "far to near"),
        (lambda: BlockList(4, 4, np.zeros((2, 2), dtype=int)), r"\[heads, query blocks, n\]"),
        (lambda: BlockList(0, 4, np.zeros((1, 1, 1), dtype=int)), "blocks of 0 and 4"),
        (lambda: BlockList(4, 4, np.zeros((1, 1, 1))), "float64"),
        (lambda: VariableBlockList([0, 4], [0, 5], np.zeros((1, 1, 1), int)), "hold 4 and 5"),
        (lambda: VariableBlockList([0, 4], [0, 4], np.ones((1, 1, 1), int)), "the last is 0"),
        (lambda: VariableBlockList([0, 4], [0, 4], np.zeros((1, 1, 1), int)).check(5), "hold 4"),
        (lambda: patterns.top_blocks(np.zeros((2, 2)), 1, 4, 4), "scores are"),
        (lambda: BlockList(4, 4, np.zeros((1, 1, 1), int)).area(9), "ends at query block 0"),
        (lambda: PerHead(()), "one mask at least"),
        (lambda: patterns.causal_blockwise([0]), "one block at least"),
        (lambda: patterns.growing_windows(8, [(1, 0.5), (0, 0.01)]), "one token at least"),
        (lambda: dense_form(Documents([0, 5]), 6), "the stream 6"),
        (lambda: (Causal() | DocumentPrefix([0, 5], 1)).check(6), "documents hold 5 tokens"),
        (lambda: PerHead((Causal(), StridedBlocks(7, 1, 2))).check(6), "blocks hold 7 tokens"),
        (lambda: (BlockCausal([0, 4]) & Full()).check(6), "blocks hold 4 tokens"),
        (lambda: Predicate(lambda q, k, h: k < q, Documents([0, 5])).check(6), "hold 5 tokens"),
    ],
)
def test_bad_rules_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
