"""Every token on exactly one rank, shares as equal as they can be, at any lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_attn.errors import PlanError
from dist_attn.layout import Layout, from_intervals, make_layout

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
