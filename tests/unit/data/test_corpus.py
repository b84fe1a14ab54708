import itertools
import json
import threading

import numpy as np
import pytest
import tokenizers

from dist_attn.config import DataConfig
from dist_attn.data import IndexedWriter, cache, open_corpus
from dist_attn.errors import CorpusError

WORDS = ["", "a", "bcd", "efghijklmnop"]  # with the end token: 0, 2, 4 and 13 tokens


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, word in enumerate(WORDS):
        (tmp_path / "texts" / f"{i}.txt").write_text(word)
    return tmp_path


def text_corpus(folder, progress=None, **settings):
    config = DataConfig(corpus={"kind": "text", "path": str(folder / "texts")}, **settings)
    return open_corpus(config, folder / "cache", progress)


def megatron_corpus(folder, documents, dtype=np.int32, name="m", **settings):
    with IndexedWriter(folder / name, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    config = DataConfig(corpus={"kind": "megatron", "path": str(folder / name)}, **settings)
    return open_corpus(config, folder / "cache")


def all_documents(corpus):
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def test_documents_end_with_the_end_token_and_empty_ones_are_counted(folder):
    corpus = text_corpus(folder)
    assert all_documents(corpus) == [[*word.encode(), 256] for word in WORDS[1:]]
    assert corpus.lengths.tolist() == [2, 4, 13]
    assert corpus.lengths.dtype == np.int64
    report = corpus.report
    assert (report.documents_read, report.tokens_read, report.longest_tokens) == (3, 19, 13)
    assert (report.empty_skipped, report.num_files, report.num_overlong) == (1, 4, 0)
    assert corpus.name(1) == str(folder / "texts" / "2.txt")
    assert corpus.slice(2, 3, 5).tolist() == [104, 105]


def test_second_open_reads_no_text(folder, monkeypatch):
    calls = []
    first = text_corpus(folder, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (16, 16)
    monkeypatch.setattr(cache, "_write_store", None)
    second = text_corpus(folder)
    assert (first.report.cached, second.report.cached) == (False, True)
    assert second.fingerprint == first.fingerprint
    assert all_documents(second) == all_documents(first)


def test_cache_follows_its_inputs(folder):
    before = text_corpus(folder)
    (folder / "texts" / "1.txt").write_text("z")
    after = text_corpus(folder)
    assert not after.report.cached
    assert after.document(0).tolist() == [122, 256]
    assert after.fingerprint != before.fingerprint
    assert before.document(0).tolist() == [97, 256]  # an open corpus keeps what it mapped
    vocabulary = {"[UNK]": 0, "a": 1}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.save(str(folder / "t.json"))
    other = text_corpus(folder, tokenizer=str(folder / "t.json"))
    assert not other.report.cached
    assert other.vocab_size == 2
    assert all_documents(other) == [[0], [0], [0]]


def test_fingerprint_is_of_the_content_not_of_its_place(folder, tmp_path_factory):
    before = text_corpus(folder)
    other = tmp_path_factory.mktemp("elsewhere")
    (folder / "texts").rename(other / "texts")
    assert text_corpus(other).fingerprint == before.fingerprint
    assert text_corpus(other, max_document_tokens=5, overlong="drop").fingerprint != (
        before.fingerprint
    )


def test_one_of_several_callers_builds(folder, monkeypatch):
    built = []
    write = cache._write_store
    monkeypatch.setattr(cache, "_write_store", lambda *args: (built.append(1), write(*args)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(text_corpus(folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert len({corpus.fingerprint for corpus in found}) == 1
    assert sorted(corpus.report.cached for corpus in found) == [False, True, True, True]


def test_failed_build_leaves_no_corpus(folder):
    (folder / "texts" / "9.txt").write_bytes(b"\xff")
    for _ in range(2):
        with pytest.raises(CorpusError, match="not valid UTF-8"):
            text_corpus(folder)
    assert [p.suffix for p in (folder / "cache").iterdir()] == [".lock"]


def test_damaged_cache_is_named(folder):
    text_corpus(folder)
    (built,) = (p for p in (folder / "cache").iterdir() if p.is_dir())
    whole = (built / "tokens.bin").read_bytes()
    (built / "tokens.bin").write_bytes(whole[:-2])
    with pytest.raises(CorpusError, match=r"tokens\.bin is truncated"):
        text_corpus(folder)
    (built / "tokens.bin").write_bytes(whole)
    (built / "summary.json").write_text("{")
    with pytest.raises(CorpusError, match=r"summary\.json is damaged"):
        text_corpus(folder)
    (built / "summary.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CorpusError, match=r"summary\.json is damaged"):
        text_corpus(folder)


def test_cache_that_cannot_be_written(folder):
    (folder / "cache").write_text("a file")
    with pytest.raises(CorpusError, match=r"cannot use the cache .*data\.cache_dir"):
        text_corpus(folder)


def test_corpus_without_text(folder):
    for path in (folder / "texts").iterdir():
        path.write_text("")
    with pytest.raises(CorpusError, match="the corpus is empty: 4 files"):
        text_corpus(folder)


def test_overlong_documents_are_refused_by_name(folder):
    with pytest.raises(CorpusError) as caught:
        text_corpus(folder, max_document_tokens=3)
    message = str(caught.value)
    assert f"{folder / 'texts' / '2.txt'} has 4 tokens" in message
    assert "(3); 2 of 3 documents do and the longest has 13" in message
    assert "'split'" in message
    assert "'drop'" in message
    assert len(text_corpus(folder, max_document_tokens=13)) == 3


def test_overlong_documents_are_dropped_and_counted(folder):
    corpus = text_corpus(folder, max_document_tokens=4, overlong="drop")
    assert corpus.lengths.tolist() == [2, 4]
    assert (corpus.report.dropped, corpus.report.dropped_tokens) == (1, 13)
    assert "1 longer than 4 dropped with 13 tokens" in str(corpus.report)
    with pytest.raises(CorpusError, match="no document is left"):
        text_corpus(folder, max_document_tokens=1, overlong="drop")


@pytest.mark.parametrize("limit", range(2, 16))
def test_splitting_keeps_every_target_once(folder, limit):
    whole = text_corpus(folder)
    corpus = text_corpus(folder, max_document_tokens=limit, overlong="split")
    assert corpus.lengths.max() <= limit
    assert corpus.lengths.min() >= 2

    def targets(documents):
        return sorted(pair for d in documents for pair in itertools.pairwise(d))

    assert targets(all_documents(corpus)) == targets(all_documents(whole))
    pieces = [d for i, d in enumerate(all_documents(corpus)) if "3.txt" in corpus.name(i)]
    assert sum((p[1:] for p in pieces), pieces[0][:1]) == whole.document(2).tolist()
    cut = sum(n > limit for n in (2, 4, 13))
    assert corpus.report.num_overlong == cut
    assert corpus.report.tokens == corpus.lengths.sum()
    assert corpus.report.tokens_read == 19
    if cut == 1:
        assert corpus.report.split_into == len(pieces)
        assert corpus.name(2).endswith(f"3.txt tokens 0 to {limit}")


def test_splitting_needs_two_tokens(folder):
    with pytest.raises(CorpusError, match="2 or more, got 1"):
        text_corpus(folder, max_document_tokens=1, overlong="split")


def test_gather_reads_what_slices_read(folder):
    corpus = text_corpus(folder, max_document_tokens=5, overlong="split")
    places = [(i, p) for i, n in enumerate(corpus.lengths) for p in range(n)]
    np.random.default_rng(0).shuffle(places)
    documents, positions = np.array(places).T
    expected = [int(corpus.document(i)[p]) for i, p in places]
    assert corpus.gather(documents, positions).tolist() == expected


def test_indexed_corpus_is_read_in_place(folder):
    corpus = megatron_corpus(folder, [[], [1, 2, 3], [], [256]])
    assert all_documents(corpus) == [[1, 2, 3], [256]]
    assert corpus.report.empty_skipped == 2
    assert corpus.name(1) == f"{folder / 'm'} document 3"
    assert not list((folder / "cache").rglob("*.bin"))


def test_indexed_corpus_is_scanned_once(folder, monkeypatch):
    first = megatron_corpus(folder, [[1, 2], [3]])
    monkeypatch.setattr(cache, "_scan", None)
    config = DataConfig(corpus={"kind": "megatron", "path": str(folder / "m")})
    assert open_corpus(config, folder / "cache").fingerprint == first.fingerprint


def test_token_ids_outside_the_vocabulary(folder):
    with pytest.raises(
        CorpusError, match=r"m document 2 holds the token id 257, but the tokenizer"
    ):
        megatron_corpus(folder, [[1], [], [5, 257, 2], [257]])
    with pytest.raises(CorpusError, match="negative token id -4 in document 1"):
        megatron_corpus(folder, [[1], [5, -4]], name="negative")
    corpus = text_corpus(folder)
    corpus.require_vocab(257)
    with pytest.raises(CorpusError, match=r"token id 256, but the model has 256 ids, 0 to 255"):
        corpus.require_vocab(256)


def test_indexed_corpus_without_documents(folder):
    with pytest.raises(CorpusError, match="no document is left"):
        megatron_corpus(folder, [[], []])
