"""A corpus as tokens on disk: tokenised once, then memory-mapped.

A corpus of texts becomes one folder of the cache: the tokens as an indexed pair, where each
document came from, the files as they were, and a summary. The folder's name is a hash of everything
that the tokens depend on, it appears whole by one rename, and it does not depend on the length
limit, which is applied when the corpus is opened. Several processes may ask for the same corpus;
one builds, the others wait. An indexed pair of the user's is read in place; the cache keeps only
what one pass over its tokens found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_attn.config import DataConfig
from dist_attn.data.indexed import (
    IndexedReader,
    IndexedWriter,
    IntArray,
    TokenArray,
    bin_path,
    idx_path,
    sync_folder,
)
from dist_attn.data.readers import Record, Source, document_name, find_source
from dist_attn.data.tokenizer import Tokenizer, token_dtype
from dist_attn.data.watch import MappedFile, State, states
from dist_attn.errors import CorpusError

#: Called with what is done and what there is to do, in bytes.
Progress = Callable[[int, int], None]

_FORMAT = 2
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Summary:
    """What one pass over all tokens found."""

    format: int
    num_documents: int
    #: Texts without a token, which are left out.
    num_empty: int
    #: SHA-256 of all tokens in order.
    digest: str
    max_token_id: int
    #: A document that holds it.
    max_token_document: int


@dataclass(frozen=True)
class TokenStore:
    """All documents of a corpus as tokens, at their full length."""

    kind: str
    files: tuple[str, ...]
    reader: IndexedReader
    #: int64 [num_documents, 2], file and row of each; None where the row is the document's index.
    origins: IntArray | None
    summary: Summary
    #: Whether the cache had it already.
    cached: bool
    #: The name of its folder in the cache; None of a pair that is read in place.
    folder: str | None
    #: The texts as they were when the tokens were made of them.
    sources: tuple[State, ...]
    #: What is read while a run goes on.
    mapped: tuple[MappedFile, ...]

    def name(self, document: int) -> str:
        """Say where a document stood: its file, and its row."""
        file, row = (0, document) if self.origins is None else self.origins[document].tolist()
        return document_name(self.kind, self.files[file], row)


def open_store(
    config: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Progress | None = None,
    begun_with: str | None = None,
) -> TokenStore:
    """Open the tokens of a corpus, building them if the cache lacks them.

    A run that goes on passes the folder that it has begun with. If the cache still has it, and it
    is of the same corpus and tokenizer, it is used also where the texts have changed since; the
    store's `sources` show that.

    Raises:
        CorpusError: the corpus or the cache cannot be used.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if config.corpus.kind == "megatron":
            return _open_indexed(config, cache_dir, progress)
        if begun_with is not None and _is_of(cache_dir / begun_with, config, tokenizer):
            return _open_folder(cache_dir / begun_with, cached=True)
        return _open_texts(config, tokenizer, cache_dir, progress)
    except OSError as error:
        raise CorpusError(
            f"cannot use the cache {cache_dir}: {error}; set data.cache_dir to a folder that can "
            f"be written and has room"
        ) from None


def _open_texts(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, progress: Progress | None
) -> TokenStore:
    source = find_source(config.corpus)
    sources = states(source.files)
    key = _key(source.kind, source.field, sources, tokenizer.digest)
    folder = cache_dir / f"{source.kind}-{key}"
    cached = folder.exists()
    if not cached:
        with _locked(folder.with_name(folder.name + ".lock")):
            cached = folder.exists()
            if not cached:
                origin = {"corpus": config.corpus.model_dump(), "tokenizer": tokenizer.digest}
                _build(source, tokenizer, folder, {**origin, "files": sources}, progress)
    return _open_folder(folder, cached=cached)


def _open_folder(folder: Path, *, cached: bool) -> TokenStore:
    summary = _load_summary(folder / "summary.json")
    reader = IndexedReader(folder / "tokens")
    try:
        origins: IntArray = np.load(folder / "origins.npy", mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise CorpusError(
            f"{folder / 'origins.npy'} is damaged: {error}; delete {folder}"
        ) from None
    if not len(origins) == len(reader) == summary.num_documents:
        raise CorpusError(f"the cached corpus {folder} contradicts itself; delete this folder")
    origin = _load_origin(folder)
    (_, *state), *_ = states([bin_path(folder / "tokens")])
    if state != origin["tokens"] and _scan(reader, None).digest != summary.digest:
        raise CorpusError(
            f"{bin_path(folder / 'tokens')} holds other tokens than were written; delete {folder}"
        )
    sources = tuple((str(path), int(size), int(at)) for path, size, at in origin["files"])
    files = tuple(path for path, _, _ in sources)
    mapped = MappedFile(bin_path(folder / "tokens")), MappedFile(folder / "origins.npy")
    kind = str(origin["corpus"]["kind"])
    return TokenStore(kind, files, reader, origins, summary, cached, folder.name, sources, mapped)


def _is_of(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> bool:
    """Whether a folder of the cache holds this corpus, at whatever time its files were read."""
    if not folder.is_dir():
        return False
    origin = _load_origin(folder)
    same_corpus: bool = origin["corpus"] == config.corpus.model_dump()
    return same_corpus and origin["tokenizer"] == tokenizer.digest


def _load_origin(folder: Path) -> dict[str, Any]:
    path = folder / "origin.json"
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
        return {key: origin[key] for key in ("corpus", "tokenizer", "files", "tokens")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"the cache file {path} is damaged ({error}); delete {folder}") from None


def _open_indexed(config: DataConfig, cache_dir: Path, progress: Progress | None) -> TokenStore:
    assert config.corpus.path is not None
    prefix = Path(config.corpus.path).expanduser()
    reader = IndexedReader(prefix)
    files = (bin_path(prefix), idx_path(prefix))
    path = cache_dir / f"megatron-{_key('megatron', '', states(files), '')}.json"
    cached = path.exists()
    if not cached:
        _write_atomic(path, asdict(_scan(reader, progress)))
    mapped = (MappedFile(bin_path(prefix)),)
    summary = _load_summary(path)
    return TokenStore("megatron", (str(prefix),), reader, None, summary, cached, None, (), mapped)


def _build(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    origin: dict[str, Any],
    progress: Progress | None,
) -> None:
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        _write_store(source, tokenizer, temporary, progress)
        (_, *state), *_ = states([bin_path(temporary / "tokens")])
        _write_atomic(temporary / "origin.json", {**origin, "tokens": state})
        sync_folder(temporary)
        # Where the lock does not hold (some network file systems), another process may have been
        # faster; its folder is as good.
        with contextlib.suppress(FileExistsError):
            temporary.rename(folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_store(
    source: Source, tokenizer: Tokenizer, folder: Path, progress: Progress | None
) -> None:
    origins = array("q")
    tally = _Tally()
    num_empty = 0
    report = _progress_by_file(source.files, progress)
    with IndexedWriter(folder / "tokens", token_dtype(tokenizer.vocab_size)) as writer:
        for records in _batches(source.records()):
            for record, ids in zip(
                records, tokenizer.encode([r.text for r in records]), strict=True
            ):
                if not ids.size:
                    num_empty += 1
                    continue
                tokens = ids.astype(token_dtype(tokenizer.vocab_size))
                tally.add(tokens, len(origins) // 2)
                writer.add_document(tokens)
                origins.extend((record.file, record.row))
            report(records[-1])
        if not origins:
            raise CorpusError(
                f"the corpus is empty: {len(source.files)} files of kind '{source.kind}' from "
                f"{source.files[0]} on, none with any text"
            )
    pairs = np.array(origins, np.int64).reshape(-1, 2)
    with (folder / "origins.npy").open("wb") as handle:
        np.save(handle, pairs)
        handle.flush()
        os.fsync(handle.fileno())
    _write_atomic(folder / "summary.json", asdict(tally.summary(len(pairs), num_empty)))


class _Tally:
    """Gathers the summary of tokens that pass by."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._max = (-1, 0)

    def add(self, tokens: TokenArray, document: int) -> None:
        """Take in tokens of which `document` holds the largest."""
        self._hash.update(np.ascontiguousarray(tokens).data)
        self._max = max(self._max, (int(tokens.max()), -document))

    def summary(self, num_documents: int, num_empty: int) -> Summary:
        """Sum up what was found."""
        token, document = self._max
        return Summary(_FORMAT, num_documents, num_empty, self._hash.hexdigest(), token, -document)


def _scan(reader: IndexedReader, progress: Progress | None) -> Summary:
    tally = _Tally()
    done = 0
    for tokens in reader.scan():
        smallest = int(tokens.min())
        if smallest < 0:
            at = done + int(tokens.argmin())
            raise CorpusError(
                f"{bin_path(reader.prefix)} holds the negative token id {smallest} in document "
                f"{reader.document_at(at)}; token ids are 0 or more"
            )
        tally.add(tokens, reader.document_at(done + int(tokens.argmax())))
        done += tokens.size
        if progress is not None:
            progress(done * reader.dtype.itemsize, reader.num_tokens * reader.dtype.itemsize)
    return tally.summary(len(reader), 0)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _progress_by_file(
    files: tuple[Path, ...], progress: Progress | None
) -> Callable[[Record], None]:
    if progress is None:
        return lambda record: None
    starts = np.cumsum([0] + [path.stat().st_size for path in files])
    return lambda record: progress(int(starts[record.file]) + record.done_bytes, int(starts[-1]))


def _key(kind: str, field: str, files: list[State], tokenizer: str) -> str:
    content = json.dumps([_FORMAT, kind, field, files, tokenizer])
    return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _load_summary(path: Path) -> Summary:
    try:
        summary = Summary(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CorpusError(f"the cache file {path} is damaged ({error}); delete it") from None
    assert summary.format == _FORMAT
    return summary


def _write_atomic(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; where the file system has none, the final rename alone keeps order."""
    with path.open("w") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
