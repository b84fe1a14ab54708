"""The tables for the block-sparse kernels say what the mask says, for any tokens on either side."""

import time

import numpy as np
import pytest
import torch

from dist_attn.attention import partial_tiles
from dist_attn.attention.block_lists import BlockSparse, list_runs
from dist_attn.config_masks import LayerMaskConfig
from dist_attn.masks import Causal, Mask, PerHead, Window, patterns
from dist_attn.masks.layers import document_mask
from dist_attn_kernels import rules
from dist_attn_kernels.lists import BITS, INTERVAL
from dist_attn_kernels.runs import TileRuns
from tests.block_tables import walk_cols, walk_rows
from tests.mask_zoo import NUM_HEADS, SEQ_LEN, zoo
from tests.unit.masks.test_longca import HEADS, MILLION, MILLIONS

ZOO = zoo()
#: Masks that keep a fixed part of the square, or have a table of intervals for each head.
DENSE_TABLES = (
    "full", "causal", "prefix lm", "s2", "s2 and dense heads", "streaming heads", "shifted groups",
)  # fmt: skip
RNG = np.random.default_rng(2)


def dense_of(runs: TileRuns | None, num_heads: int, shape: tuple[int, int]) -> np.ndarray:
    """bool [heads, queries, keys] of every query head."""
    if runs is None:
        return np.zeros((num_heads, *shape), dtype=bool)
    dense = rules.dense_mask(runs.tiles()).numpy()
    return np.repeat(dense, num_heads // len(dense), axis=0)


def check(mask: Mask, q: np.ndarray, k: np.ndarray, heads: range, num_kv_heads: int) -> None:
    seq_len = max(q.max(), k.max()) + 1
    want = np.stack([mask.materialize(seq_len, h)[np.ix_(q, k)] for h in heads])
    runs = list_runs(mask, (q, k), heads, num_kv_heads)
    np.testing.assert_array_equal(dense_of(runs, len(heads), want.shape[1:]), want)
    lists = BlockSparse(mask, (q, k), heads, num_kv_heads, torch.device("cpu")).lists
    if runs is None:
        assert lists is None
        return
    for walk in (walk_rows, walk_cols):
        for narrow in (False, True):
            if narrow and lists.narrow is None:
                continue
            dense = walk(lists, narrow=narrow)
            repeats = len(heads) // len(dense)
            np.testing.assert_array_equal(np.repeat(dense, repeats, axis=0), want)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("scattered", [False, True])
def test_tables_say_what_the_mask_says(name, scattered):
    q = k = np.arange(SEQ_LEN)
    if scattered:
        q, k = (np.sort(RNG.choice(SEQ_LEN, n, replace=False)) for n in (70, 81))
    for heads, num_kv_heads in ((range(NUM_HEADS), 2), (range(1, 3), 1)):
        check(ZOO[name], q, k, heads, num_kv_heads)


@pytest.mark.parametrize("block", [64, 48])
def test_tables_of_sparse_layers_over_documents(block):
    config = LayerMaskConfig(kind="s2", block_tokens=block, local_blocks=3, stride_blocks=3)
    mask = document_mask(config, [0, 500, 533, 900], 8, 4)
    for q, k in (
        (np.arange(900), np.arange(900)),
        (np.r_[0:200, 700:900], np.r_[200:440, 600:800]),
    ):
        check(mask, q, k, range(2, 6), 2)


def test_nothing_to_see_gives_no_tables():
    assert list_runs(Causal(), (np.arange(10), np.arange(10, 20)), range(2), 2) is None


def kinds_of(mask: Mask, seq_len: int, heads: range) -> np.ndarray:
    positions = np.arange(seq_len)
    return list_runs(mask, (positions, positions), heads, len(heads)).partial[3]


def test_the_diagonal_of_a_thinned_mask_is_cut_by_intervals():
    assert (kinds_of(patterns.s2(4096, 64, 4, 4, 2), 4096, range(2)) == INTERVAL).all()
    # Blocks that begin inside tiles are cut by bits, alike in every row that does not cut them too.
    shifted = document_mask(
        LayerMaskConfig(kind="s2", block_tokens=64, local_blocks=2, stride_blocks=4),
        [0, 32, 4128], 1, 1,
    )  # fmt: skip
    kinds = kinds_of(shifted, 4128, range(1))
    assert (kinds >= BITS).sum() > 500
    assert kinds.max() - BITS < 100


def test_heads_of_one_pattern_share_their_tiles():
    mask = patterns.s2(4096, 64, 4, 4, 16)
    positions = np.arange(4096)
    runs = list_runs(mask, (positions, positions), range(16), 16)
    assert runs.num_heads == 4
    assert runs.group_of.tolist() == [0, 1, 2, 3] * 4
    by_kv = document_mask(
        LayerMaskConfig(kind="s2", block_tokens=64, local_blocks=2, stride_blocks=4),
        [0, 4096], 16, 8,
    )  # fmt: skip
    runs = list_runs(by_kv, (positions, positions), range(16), 8)
    assert (runs.num_heads, runs.heads_per_kv, len(runs.group_of)) == (4, 1, 8)


def seconds_of_tables(mask: Mask, seq_len: int, num_heads: int) -> float:
    """Processor time of the tables of forward and backward, from the mask on."""
    positions = np.arange(seq_len)
    start = time.process_time()
    BlockSparse(mask, (positions, positions), range(num_heads), num_heads, torch.device("cpu"))
    return time.process_time() - start


def test_tables_of_128k_tokens_and_32_heads_take_a_moment():
    mask = patterns.s2(1 << 17, 64, 16, 16, 32)
    # The machine may be busy. To sort the 5.2 million tiles took more than a second.
    assert min(seconds_of_tables(mask, 1 << 17, 32) for _ in range(2)) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", MILLIONS)
def test_tables_of_a_million_tokens_and_32_heads(name):
    mask = MILLIONS[name]
    if name in DENSE_TABLES:
        pytest.skip("its table of every tile takes half a gibibyte and more")
    limit = 6.0 if name == "listed blocks" else 1.5  # 8.4 million tiles without any order
    assert min(seconds_of_tables(mask, MILLION, HEADS) for _ in range(2)) < limit


def test_tables_are_kept_apart_where_windows_differ():
    mask = PerHead((Window(70, 0), Window(200, 0)))
    runs = list_runs(mask, (np.arange(512),) * 2, range(2), 2)
    assert runs.intervals.shape == (2, 2, 512)
    same = list_runs(Window(70, 0), (np.arange(512),) * 2, range(2), 2)
    assert same.intervals.shape == (1, 2, 512)


@pytest.mark.parametrize("collide", [False, True])
def test_different_rows_are_told_apart_even_if_their_hashes_are_not(collide, monkeypatch):
    if collide:
        monkeypatch.setattr(partial_tiles, "_hash", lambda rows: np.zeros(len(rows), np.uint64))
    rows = RNG.integers(0, 2, (50, 16)).astype(np.uint64)[RNG.integers(0, 9, 200)]
    different, index = partial_tiles.different(rows)
    np.testing.assert_array_equal(different[index], rows)
    assert len(different) == len(np.unique(rows, axis=0))
