"""Every token on exactly one rank, shares as equal as they can be, at any lengths."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_attn.errors import PlanError
from dist_attn.layout import Layout, from_intervals, make_layout, shares_of_fractions
from dist_attn.masks import Queries, patterns

lengths_st = st.lists(st.integers(0, 40), max_size=12)


@given(
    lengths=lengths_st, cp_size=st.integers(1, 9), kind=st.sampled_from(["contiguous", "zigzag"])
)
def test_every_token_is_held_once(lengths, cp_size, kind):
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    layout = make_layout(kind, cu, cp_size)
    layout.validate()
    positions = [layout.positions(r) for r in range(cp_size)]
    assert sorted(np.concatenate(positions).tolist()) == list(range(sum(lengths)))
    assert all((np.diff(p) > 0).all() for p in positions)
    assert [len(p) for p in positions] == list(layout.local_seq_lens)
    assert max(layout.local_seq_lens) - min(layout.local_seq_lens) <= 1
    stream = np.concatenate(positions)[layout.stream_order]
    assert stream.tolist() == list(range(sum(lengths)))


def causal_area(layout: Layout, cu: np.ndarray) -> list[int]:
    start = cu[np.searchsorted(cu, np.arange(layout.seq_len), side="right") - 1]
    areas = [layout.positions(r) - start[layout.positions(r)] + 1 for r in range(layout.cp_size)]
    return [int(a.sum()) for a in areas]


def test_zigzag_gives_each_rank_an_equal_causal_area():
    cu = np.array([0, 1001, 1001, 1018, 4000])
    zigzag = causal_area(make_layout("zigzag", cu, 4), cu)
    assert max(zigzag) < 1.01 * np.mean(zigzag)
    contiguous = causal_area(make_layout("contiguous", cu, 4), cu)
    assert max(contiguous) > 1.3 * np.mean(contiguous)


def test_zigzag_of_one_document():
    layout = make_layout("zigzag", [0, 11], 2)
    assert [p.tolist() for p in layout.pieces] == [[[0, 3], [8, 11]], [[3, 8]]]


def test_one_token_documents_are_spread():
    assert make_layout("zigzag", range(8), 3).local_seq_lens == (3, 2, 2)


@pytest.mark.parametrize("cu", [[1, 2], [0, 3, 2], []])
def test_bad_boundaries_are_refused(cu):
    with pytest.raises(PlanError, match="cu_seqlens"):
        make_layout("zigzag", cu, 2)


def test_unknown_layouts_are_refused():
    with pytest.raises(PlanError, match="unknown layout 'spiral'"):
        make_layout("spiral", [0, 4], 2)


@pytest.mark.parametrize(
    "intervals", [[[[0, 3]], [[2, 5]]], [[[0, 3]], [[4, 5]]], [[[0, 3]], [[3, 4]]]]
)
def test_a_layout_that_loses_or_repeats_tokens_is_refused(intervals):
    with pytest.raises(PlanError, match="exactly once"):
        from_intervals(5, [np.array(i) for i in intervals]).validate()


def long_tail(seed: int) -> np.ndarray:
    """Boundaries of documents whose lengths have a long tail."""
    lengths = np.random.default_rng(seed).lognormal(7.0, 1.6, 120).astype(int) + 1
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.mark.parametrize("seed", range(5))
def test_balanced_is_within_5_percent_on_long_tails(seed):
    cu = long_tail(seed)
    layout = make_layout("balanced", cu, 8)
    layout.validate()
    area = causal_area(layout, cu)
    assert max(area) < 1.05 * np.mean(area)
    chunk = max(1, int(cu[-1]) // 256)
    assert max(layout.local_seq_lens) - min(layout.local_seq_lens) <= 2 * chunk
    striped = causal_area(make_layout("contiguous", cu, 8), cu)
    assert max(striped) > 1.05 * np.mean(striped)


LENGTHS_OF_WIKIPEDIA = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "wikipedia_lengths.txt.gz"
)


@pytest.mark.skipif(
    not LENGTHS_OF_WIKIPEDIA.is_file(), reason=f"no lengths at {LENGTHS_OF_WIKIPEDIA}"
)
@pytest.mark.parametrize("cp_size", [2, 8, 32])
def test_balanced_is_within_5_percent_on_real_lengths(cp_size):
    """Streams of some 128K tokens of consecutive real documents, and one with a very long one."""
    with gzip.open(LENGTHS_OF_WIKIPEDIA, "rt") as lines:
        lengths = np.array([int(line) for line in lines])
    longest = np.flatnonzero((lengths > 60_000) & (lengths < 120_000))[:3]
    starts = [*range(0, 5000, 500), *(longest - 20)]
    for start in starts:
        stream = lengths[start:]
        stream = stream[: max(1, np.searchsorted(np.cumsum(stream), 1 << 17))]
        cu = np.concatenate([[0], np.cumsum(stream)])
        layout = make_layout("balanced", cu, cp_size)
        layout.validate()
        area = causal_area(layout, cu)
        assert max(area) < 1.05 * np.mean(area), start
        tokens = layout.local_seq_lens
        assert max(tokens) < 1.05 * np.mean(tokens), start


def test_balanced_follows_the_area_it_is_given():
    cu = np.array([0, 4096])
    window = patterns.sliding_window(100) | Queries(0, 64)
    layout = make_layout("balanced", cu, 4, chunk_areas=lambda p: window.row_areas(p, 4096))
    areas = [int(window.row_areas(layout.positions(r), 4096).sum()) for r in range(4)]
    assert max(areas) < 1.5 * np.mean(areas)


@given(data=st.data(), cp_size=st.integers(1, 5))
def test_placed_holds_what_it_was_told(data, cp_size):
    lengths = np.array(data.draw(lengths_st), dtype=np.int64)
    weights = data.draw(
        st.lists(
            st.lists(st.integers(0, 5), min_size=cp_size, max_size=cp_size).filter(any),
            min_size=len(lengths),
            max_size=len(lengths),
        )
    )
    fractions = np.array(weights, dtype=float).reshape(len(lengths), cp_size)
    shares = shares_of_fractions(lengths, fractions)
    assert (shares.sum(axis=1) == lengths).all()
    assert (shares[fractions == 0] == 0).all()
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    layout = make_layout("placed", cu, cp_size, shares=shares)
    layout.validate()
    for r in range(cp_size):
        held = np.searchsorted(layout.positions(r), cu)
        assert np.diff(held).tolist() == shares[:, r].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "zigzag", "chunk_tokens": 4}, "takes no chunk_tokens"),
        ({"kind": "striped", "chunk_tokens": 0}, "one token at least"),
        ({"kind": "placed"}, "needs shares"),
        ({"kind": "placed", "shares": np.array([[1, 2, 3]])}, r"must be \[1, 2\]"),
        ({"kind": "placed", "shares": np.array([[1, 2]])}, r"add up to its 8 tokens, got \[1, 2\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_layout(cu_seqlens=[0, 8], cp_size=2, **arguments)


def test_fractions_of_nothing_are_refused():
    with pytest.raises(PlanError, match="not all of them 0"):
        shares_of_fractions([3], np.zeros((1, 2)))
