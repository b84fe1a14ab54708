from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_attn.config import DataConfig
from dist_attn.data import IGNORE_INDEX, IndexedWriter, build_local_batch, open_corpus, valid_tokens
from dist_attn.planner.plan import Group

NUM_DOCUMENTS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    # Every token of the corpus is another one, so that a misplaced token cannot pass.
    ids = rng.permutation(60_000)
    with IndexedWriter(folder / "m", np.uint16) as writer:
        for n in [1, 2, 3, 200, *rng.integers(1, 90, NUM_DOCUMENTS - 4)]:
            document, ids = ids[:n], ids[n:]
            writer.add_document(document)
    tokenizer = folder / "tokenizer.json"
    words = ",".join(f'"{i}":{i}' for i in range(60_000))
    tokenizer.write_text(
        f'{{"model": {{"type": "WordLevel", "vocab": {{{words}}}, "unk_token": "0"}}}}'
    )
    config = DataConfig(
        corpus={"kind": "megatron", "path": str(folder / "m")},
        tokenizer=str(tokenizer),
        max_document_tokens=64,
        overlong="split",
    )
    return open_corpus(config, folder / "cache")


def make_group(documents, degree, strategy="ring"):
    given_values = {
        "ranks": tuple(range(degree)),
        "strategy": strategy if degree > 1 else "local",
        "documents": tuple(documents),
    }
    return Group(**{f.name: given_values.get(f.name, 0) for f in fields(Group)})


def triples(batch):
    """(token, label, position) of the tokens that belong to documents."""
    kept = batch.input_ids.shape[1] - batch.num_padding
    rows = (batch.input_ids, batch.shift_labels, batch.position_ids)
    return list(zip(*(row[0, :kept].tolist() for row in rows), strict=True))


def expected(corpus, document_ids):
    found = []
    for i in document_ids:
        tokens = corpus.document(i).tolist()
        found += zip(tokens, [*tokens[1:], IGNORE_INDEX], range(len(tokens)), strict=True)
    return found


LAYOUTS = ["contiguous", "zigzag", "striped", "balanced"]


@st.composite
def plans(draw):
    """Document ids of a batch, dealt to groups of random degrees; groups may be empty."""
    ids = draw(st.lists(st.integers(0, NUM_DOCUMENTS - 1), min_size=1, max_size=12))
    degrees = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    home = [draw(st.integers(0, len(degrees) - 1)) for _ in ids]
    groups = [
        make_group([i for i, g in enumerate(home) if g == number], degree)
        for number, degree in enumerate(degrees)
    ]
    return ids, groups


@settings(max_examples=60, deadline=None)
@given(plan=plans(), kind=st.sampled_from(LAYOUTS), multiple=st.integers(1, 8))
def test_ranks_together_hold_the_documents_exactly_once(corpus, plan, kind, multiple):
    ids, groups = plan
    held, num_valid = [], 0
    for group in groups:
        for cp_rank in range(group.degree):
            batch = build_local_batch(
                corpus, ids, group, cp_rank=cp_rank, layout_kind=kind, pad_to_multiple=multiple
            )
            mine = triples(batch)
            assert len(mine) == batch.local_seq_len
            assert batch.input_ids.shape[1] % multiple == 0
            assert batch.num_padding <= max(multiple - 1, multiple if not mine else 0)
            assert batch.num_valid == int((batch.shift_labels != IGNORE_INDEX).sum())
            held += mine
            num_valid += batch.num_valid
    assert sorted(held) == sorted(expected(corpus, ids))
    assert num_valid == valid_tokens(corpus.lengths[ids])
    # The control: leaving out one rank's share, or its last token, is seen.
    assert sorted(held[:-1]) != sorted(expected(corpus, ids))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_tokens_stand_where_the_layout_says(corpus, kind, degree):
    ids = np.array([9, 3, 0, 30, 17])
    group = make_group([1, 3, 4], degree)
    stream = expected(corpus, ids[[1, 3, 4]])
    for cp_rank in range(degree):
        batch = build_local_batch(corpus, ids, group, cp_rank=cp_rank, layout_kind=kind)
        assert triples(batch) == [stream[p] for p in batch.layout.positions(cp_rank)]
        assert batch.cu_seqlens.tolist() == [0, *np.cumsum(corpus.lengths[ids[[1, 3, 4]]])]
        assert batch.max_seqlen == corpus.lengths[ids[[1, 3, 4]]].max()
        assert batch.strategy == group.strategy
        assert (batch.layout.cp_size, batch.layout.seq_len) == (degree, len(stream))


@pytest.mark.parametrize("multiple", [1, 4])
def test_idle_rank_holds_padding_alone(corpus, multiple):
    batch = build_local_batch(corpus, [3, 4], None, pad_to_multiple=multiple)
    assert batch.input_ids.tolist() == [[0] * multiple]
    assert batch.shift_labels.tolist() == [[IGNORE_INDEX] * multiple]
    assert batch.position_ids.tolist() == [[0] * multiple]
    assert (batch.num_padding, batch.num_valid, batch.local_seq_len) == (multiple, 0, 0)
    assert (batch.strategy, batch.cu_seqlens.tolist(), batch.layout.cp_size) == ("local", [0], 1)


def test_rank_without_tokens_of_a_group_holds_padding(corpus):
    shortest = int(np.argmin(corpus.lengths))
    group = make_group([0], 3)
    batches = [build_local_batch(corpus, [shortest], group, cp_rank=r) for r in range(3)]
    assert sorted(b.local_seq_len for b in batches) == [0, 0, 1]
    assert all(b.input_ids.shape == (1, 1) for b in batches)
    assert all(b.layout.cp_size == 3 for b in batches)


def test_types_and_copy_to_a_device(corpus):
    batch = build_local_batch(corpus, [3], make_group([0], 2), cp_rank=1).to("meta")
    for row in (batch.input_ids, batch.shift_labels, batch.position_ids):
        assert str(row.dtype) == "torch.int64"
        assert row.device.type == "meta"
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert batch.cu_seqlens.device.type == "cpu"


def test_valid_tokens():
    assert valid_tokens([5, 1, 0, 3]) == 6
    assert valid_tokens(np.array([], np.int64)) == 0
