from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_attn.config import BatchConfig
from dist_attn.data.sampler import BatchSampler, SamplerPosition, permutation
from dist_attn.errors import CorpusError

PINNED = [2, 7, 6, 1, 3, 0, 5, 4]
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def batches(sampler, count, position=None):
    position = position or SamplerPosition()
    found = []
    for _ in range(count):
        ids, position = sampler.batch(position)
        found.append(ids.tolist())
    return found, position


@given(LENGTHS, st.integers(1, 70), st.integers(0, 2**40), st.booleans())
def test_every_document_once_per_epoch(lengths, size, seed, shuffle):
    sampler = BatchSampler(np.array(lengths), BatchConfig(documents=size), seed, shuffle)
    found, position = batches(sampler, 3)
    assert [len(b) for b in found] == [size] * 3
    stream = list(chain(*found))
    for start in range(0, len(stream) - len(lengths) + 1, len(lengths)):
        assert sorted(stream[start : start + len(lengths)]) == list(range(len(lengths)))
    assert position == SamplerPosition(*divmod(3 * size, len(lengths)))


@given(LENGTHS, st.integers(50, 400), st.integers(0, 9), st.booleans())
def test_tokens_are_taken_until_the_next_would_pass(lengths, budget, seed, shuffle):
    sampler = BatchSampler(np.array(lengths), BatchConfig(tokens=budget), seed, shuffle)
    found, position = batches(sampler, 4)
    follower = batches(sampler, 1, position)[0][0][0]
    for batch, after in zip(found, [b[0] for b in found[1:]] + [follower], strict=True):
        total = sum(lengths[i] for i in batch)
        assert total <= budget < total + lengths[after]
    one_by_one = BatchSampler(np.array(lengths), BatchConfig(documents=1), seed, shuffle)
    stream = list(chain(*found))
    assert list(chain(*batches(one_by_one, len(stream))[0])) == stream


def test_a_position_is_all_that_resuming_needs():
    lengths = np.arange(1, 40)
    whole, _ = batches(BatchSampler(lengths, BatchConfig(tokens=100), 7), 20)
    _, position = batches(BatchSampler(lengths, BatchConfig(tokens=100), 7), 9)
    assert batches(BatchSampler(lengths, BatchConfig(tokens=100), 7), 11, position)[0] == whole[9:]


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders


def test_order_is_the_same_everywhere():
    # Checkpoints rely on it: a change here sends resumed runs through another order.
    assert permutation(8, 1234, 0).tolist() == PINNED
    assert (
        BatchSampler(np.ones(8), BatchConfig(documents=8), 1234)
        .batch(SamplerPosition())[0]
        .tolist()
        == PINNED
    )


def test_shuffle_is_even():
    first = np.array([permutation(10, seed, 3)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=10)
    assert np.all(abs(counts - 400) < 100)  # 5 standard deviations


def test_no_shuffle_keeps_the_order():
    sampler = BatchSampler(np.ones(5), BatchConfig(documents=3), 0, shuffle=False)
    assert batches(sampler, 2)[0] == [[0, 1, 2], [3, 4, 0]]


def test_complaints():
    with pytest.raises(CorpusError, match=r"has 9 tokens and fits no batch of data\.batch\.tokens"):
        BatchSampler(np.array([3, 9]), BatchConfig(tokens=8), 0)
    with pytest.raises(CorpusError, match="at least one document"):
        BatchSampler(np.array([], np.int64), BatchConfig(tokens=8), 0)
    with pytest.raises(CorpusError, match="at least one token"):
        BatchSampler(np.array([0, 1]), BatchConfig(tokens=8), 0)
    sampler = BatchSampler(np.array([3, 4]), BatchConfig(tokens=8), 0)
    with pytest.raises(CorpusError, match="outside this corpus of 2 documents"):
        sampler.batch(SamplerPosition(0, 2))
