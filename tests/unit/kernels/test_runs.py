"""Lists that are built from runs of tiles are those that sorting the tiles gives."""

import numpy as np
import pytest

from dist_attn_kernels.intervals import members, minus, overlap, size_of_union
from dist_attn_kernels.lists import BLOCK, FULL, INTERVAL, build_lists
from dist_attn_kernels.run_tables import lists_from_runs
from dist_attn_kernels.runs import LONG_RUN, TileRuns
from tests.block_tables import entries_of_rows, walk_cols, walk_rows

RNG = np.random.default_rng(5)


def made_of_kinds(
    kinds: np.ndarray, lengths: tuple[int, int], group_of: list[int], per_kv: int
) -> TileRuns:
    """Runs of tiles given as [heads, query blocks, places], in a shuffled order of keys."""
    num_heads, num_q, num_k = kinds.shape
    order = np.stack([RNG.permutation(num_k) for _ in range(num_heads)])
    if lengths[1] % BLOCK:
        last = order == num_k - 1  # reaches past the keys
        kinds = np.where(last[:, None] & (kinds == FULL), INTERVAL, kinds)
    full = np.pad((kinds == FULL).astype(np.int8), ((0, 0), (0, 0), (1, 1)))
    head, q, edge = np.nonzero(np.diff(full, axis=2))
    runs = ((head * num_q + q) * num_k + edge).reshape(-1, 2)
    head, q, place = np.nonzero(kinds > FULL)
    partial = head, q, order[head, place], kinds[head, q, place]
    intervals = np.zeros((1, 2, lengths[0]), dtype=np.int32)
    intervals[:, 1] = RNG.integers(0, lengths[1] + 1, lengths[0])
    return TileRuns(*lengths, per_kv, np.array(group_of), order, runs, partial, intervals)


def kinds_of(style: str, shape: tuple[int, int, int]) -> np.ndarray:
    if style == "random":
        return RNG.choice([0, FULL, INTERVAL], shape, p=[0.4, 0.4, 0.2])
    place, q = np.arange(shape[2]), np.arange(shape[1])[:, None]
    if style == "triangle":
        kinds = np.where(place < q, FULL, np.where(place == q, INTERVAL, 0))
    else:
        kinds = np.where(place < shape[2], FULL, 0) * np.ones_like(q)
    return np.broadcast_to(kinds, shape).copy()


@pytest.mark.parametrize("style", ["random", "triangle", "everything"])
@pytest.mark.parametrize(("group_of", "per_kv"), [([0], 1), ([0, 1, 0], 1), ([0, 0], 2)])
@pytest.mark.parametrize("lengths", [(640, 640), (65, 300), (330, 130)])
def test_they_are_those_of_sorted_tiles(style, group_of, per_kv, lengths):
    num_heads = (max(group_of) + 1) * per_kv
    shape = (num_heads, *(-(-n // BLOCK) for n in lengths))
    runs = made_of_kinds(kinds_of(style, shape), lengths, group_of, per_kv)
    got, want = lists_from_runs(runs), build_lists(runs.tiles(), per_kv)
    for name in ("num_mask_heads", "num_mask_kv_heads", "num_tiles"):
        assert getattr(got, name) == getattr(want, name)
    assert (got.has_empty_rows, got.has_empty_cols) == (want.has_empty_rows, want.has_empty_cols)
    assert entries_of_rows(got) == entries_of_rows(want)
    np.testing.assert_array_equal(walk_rows(got), walk_rows(want))
    np.testing.assert_array_equal(walk_cols(got), walk_cols(want))
    if got.narrow is not None:
        np.testing.assert_array_equal(walk_rows(got, narrow=True), walk_rows(want))
        np.testing.assert_array_equal(walk_cols(got, narrow=True), walk_rows(want))
    # Longest first inside each head.
    for head in got.rows[:, 0].unique():
        assert got.rows[got.rows[:, 0] == head, 3].diff().le(0).all()


def test_long_runs_are_written_as_short_ones():
    shape = (1, 4, 2 * LONG_RUN + 90)
    lengths = (shape[1] * BLOCK, shape[2] * BLOCK)
    runs = made_of_kinds(kinds_of("everything", shape), lengths, [0], 1)
    got, want = lists_from_runs(runs), build_lists(runs.tiles())
    assert entries_of_rows(got) == entries_of_rows(want)
    assert got.num_tiles == shape[1] * shape[2]


def test_sets_of_intervals():
    for _ in range(200):
        sets = [np.sort(RNG.choice(40, 2 * RNG.integers(0, 6), replace=False)) for _ in range(2)]
        a, b = (s.reshape(-1, 2) for s in sets)
        in_a, in_b = set(members(a).tolist()), set(members(b).tolist())
        assert members(overlap(a, b)).tolist() == sorted(in_a & in_b)
        assert members(minus(a, b)).tolist() == sorted(in_a - in_b)
        both = np.concatenate([a, b])
        assert size_of_union(both[:, 0], both[:, 1]) == len(in_a | in_b)
