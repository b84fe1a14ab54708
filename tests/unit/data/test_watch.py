"""Files that change or disappear under a corpus that is open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dist_attn.config import DataConfig
from dist_attn.data import Corpus, IndexedWriter, open_corpus
from dist_attn.errors import CorpusError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i, word in enumerate(("abc", "de", "f")):
        (tmp_path / "texts" / f"{i}.txt").write_text(word)
    return tmp_path


def texts(folder: Path, begun_with: str | None = None, **settings: object) -> Corpus:
    config = DataConfig(corpus={"kind": "text", "path": str(folder / "texts")}, **settings)
    return open_corpus(config, folder / "cache", None, begun_with)


def all_documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def cached_tokens(folder: Path) -> Path:
    (path,) = (folder / "cache").glob("*/tokens.bin")
    return path


def test_texts_that_change_leave_the_tokens_and_are_told(folder: Path) -> None:
    corpus = texts(folder)
    before = all_documents(corpus)
    assert corpus.changes() == []
    (folder / "texts" / "0.txt").write_text("other")
    (folder / "texts" / "1.txt").unlink()
    os.utime(folder / "texts" / "2.txt", ns=(1, 1))
    corpus.check()
    told = corpus.changes()
    assert len(told) == 3
    assert "0.txt has 5 bytes instead of 3" in told[0]
    assert "1.txt cannot be read any more" in told[1]
    assert "2.txt was written to" in told[2]
    assert all_documents(corpus) == before


def test_a_run_that_goes_on_gets_the_tokens_it_began_with(folder: Path) -> None:
    first = texts(folder)
    shutil.rmtree(folder / "texts")
    again = texts(folder, first.cache_folder)
    assert again.fingerprint == first.fingerprint
    assert again.report.cached
    assert again.name(1) == str(folder / "texts" / "1.txt")
    assert len(again.changes()) == 3
    # The control: without the hint, and for another corpus or tokenizer, it is not taken.
    with pytest.raises(CorpusError, match="does not exist"):
        texts(folder)
    (folder / "texts").mkdir()
    (folder / "texts" / "9.text").write_text("new")
    other = open_corpus(
        DataConfig(corpus={"kind": "text", "path": str(folder / "texts"), "glob": "*.text"}),
        folder / "cache", None, first.cache_folder,
    )  # fmt: skip
    assert other.fingerprint != first.fingerprint
    shutil.rmtree(folder / "cache" / str(first.cache_folder))
    with pytest.raises(CorpusError, match="no file that matches"):
        texts(folder, first.cache_folder)


@pytest.mark.parametrize("how", ["truncate", "overwrite"])
def test_tokens_that_are_written_to_are_refused(folder: Path, how: str) -> None:
    corpus = texts(folder)
    path = cached_tokens(folder)
    if how == "truncate":
        os.truncate(path, 4)
    else:
        with path.open("r+b") as file:
            file.write(b"\x01")
    with pytest.raises(CorpusError, match=r"tokens\.bin was written to while the run reads it"):
        corpus.check()


def test_tokens_that_are_removed_stay_readable(folder: Path) -> None:
    corpus = texts(folder)
    before = all_documents(corpus)
    shutil.rmtree(folder / "cache")
    corpus.check()
    assert any("tokens.bin cannot be read any more" in text for text in corpus.changes())
    assert all_documents(corpus) == before


def test_an_indexed_pair(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.add_document([1, 2, 3])

    write("m")
    write("other")
    config = DataConfig(corpus={"kind": "megatron", "path": str(tmp_path / "m")})
    corpus = open_corpus(config, tmp_path / "cache")
    corpus.check()
    (tmp_path / "other.bin").rename(tmp_path / "m.bin")
    corpus.check()
    assert corpus.changes() == [f"{tmp_path / 'm.bin'} is another file now"]
    second = open_corpus(config, tmp_path / "cache")
    os.truncate(tmp_path / "m.bin", 8)
    corpus.check()
    with pytest.raises(CorpusError, match=r"m\.bin was written to .*12 bytes then, 8 now"):
        second.check()


def test_cached_tokens_that_were_altered_between_runs_are_refused(folder: Path) -> None:
    texts(folder)
    path = cached_tokens(folder)
    content = bytearray(path.read_bytes())
    os.utime(path, ns=(1, 1))
    assert texts(folder).report.cached  # copied, not altered
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="holds other tokens than were written; delete"):
        texts(folder)
