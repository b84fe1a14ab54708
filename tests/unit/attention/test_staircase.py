"""The cut covers every allowed pair exactly once, at any layout, in few calls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_attn.attention.staircase import DenseCall, dense_calls
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents, dense_form


def covered(calls: list[DenseCall], num_q: int, num_k: int) -> np.ndarray:
    count = np.zeros((num_q, num_k), dtype=int)
    for call in calls:
        assert (call.q[1:, 0] >= call.q[:-1, 1]).all()
        assert (call.k[1:, 0] >= call.k[:-1, 1]).all()
        for (qa, qb), (ka, kb) in zip(call.q, call.k, strict=True):
            assert qa < qb
            assert ka < kb
            block = np.ones((qb - qa, kb - ka), dtype=int)
            assert not call.causal or qb - qa == kb - ka
            count[qa:qb, ka:kb] += np.tril(block) if call.causal else block
    assert sum(c.area for c in calls) == count.sum()
    return count


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_dealing_is_covered_once(data):
    lengths = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=5))
    cu = np.concatenate([[0], np.cumsum(lengths)])
    causal = data.draw(st.booleans())
    mask = Documents(cu) & Causal() if causal else Documents(cu)
    seq_len = int(cu[-1])
    owner = np.array(data.draw(st.lists(st.integers(0, 2), min_size=seq_len, max_size=seq_len)))
    form = dense_form(mask, seq_len)
    dense = mask.materialize(seq_len)
    for r in range(3):
        for s in range(3):
            q, k = np.flatnonzero(owner == r), np.flatnonzero(owner == s)
            calls = dense_calls(form, q, k)
            np.testing.assert_array_equal(covered(calls, len(q), len(k)), dense[np.ix_(q, k)])


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_a_ring_step_is_one_call(kind):
    cu = np.array([0, 1000, 1003, 1003, 1700, 4001])
    mask = Documents(cu) & Causal()
    layout = make_layout(kind, cu, 4)
    form = dense_form(mask, 4001)
    positions = [layout.positions(r) for r in range(4)]
    area = 0
    for r in range(4):
        for s in range(4):
            calls = dense_calls(form, positions[r], positions[s])
            assert len(calls) <= 1
            area += sum(c.area for c in calls)
    lengths = np.diff(cu)
    assert area == (lengths * (lengths + 1) // 2).sum()


def test_striped_tokens_are_one_triangle_each():
    form = dense_form(Causal(), 40)
    q, k = np.arange(1, 40, 4), np.arange(3, 40, 4)
    (call,) = dense_calls(form, q, k)
    assert call.causal
    assert call.area == 45
