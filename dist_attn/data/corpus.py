"""A corpus of tokenised documents under a length limit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_attn.config import DataConfig
from dist_attn.data.cache import Progress, TokenStore, open_store
from dist_attn.data.indexed import IntArray, TokenArray
from dist_attn.data.tokenizer import Tokenizer, load_tokenizer
from dist_attn.data.watch import differences
from dist_attn.errors import CorpusError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CorpusReport:
    """What was read and what the length limit did to it."""

    kind: str
    tokenizer: str
    num_files: int
    #: Documents with at least one token, and their tokens, before the limit.
    documents_read: int
    tokens_read: int
    #: Documents without a token, which are left out.
    empty_skipped: int
    longest_tokens: int
    max_document_tokens: int
    overlong: str
    #: Documents longer than the limit.
    num_overlong: int
    #: Pieces that they were cut into.
    split_into: int
    dropped: int
    dropped_tokens: int
    #: What can be trained on. Pieces overlap by one token, so `tokens` can pass `tokens_read`.
    documents: int
    tokens: int
    #: Whether the tokens came from the cache.
    cached: bool

    def __str__(self) -> str:
        text = (
            f"{self.documents_read:,} documents, {self.tokens_read:,} tokens from "
            f"{self.num_files:,} files ({self.kind}, tokenizer {self.tokenizer}"
            f"{', cached' if self.cached else ''}), longest {self.longest_tokens:,}"
        )
        if self.empty_skipped:
            text += f"; {self.empty_skipped:,} empty ones skipped"
        if self.split_into:
            text += (
                f"; {self.num_overlong:,} longer than {self.max_document_tokens:,} split into "
                f"{self.split_into:,}"
            )
        if self.dropped:
            text += (
                f"; {self.dropped:,} longer than {self.max_document_tokens:,} dropped with "
                f"{self.dropped_tokens:,} tokens"
            )
        return text


@dataclass(frozen=True)
class _Pieces:
    """The documents of a corpus as ranges of the stored ones."""

    sources: IntArray
    starts: IntArray
    lengths: IntArray


class Corpus:
    """Documents of at most `max_document_tokens`, read through a memory map.

    A document that was split appears as several. Neighbouring pieces share one token, the last of
    one and the first of the next: every token but the document's first is predicted exactly once,
    as if the document had not been cut.

    Attributes:
        lengths: int64 [num_documents], read-only; every one at least 1.
        vocab_size: one more than the largest id that the tokenizer can give.
        eos_id: the id that ends every document, or None.
        fingerprint: changes when any token, length or the order of the documents changes; the same
            on every machine.
        report: what was read, split and dropped.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, config: DataConfig) -> None:
        self._store = store
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self.max_token_id = store.summary.max_token_id
        self._pieces = _apply_limit(store, config)
        self.lengths: IntArray = self._pieces.lengths
        self.lengths.flags.writeable = False
        self.report = _report(store, tokenizer, config, self._pieces)
        self.require_vocab(self.vocab_size, f"the tokenizer {tokenizer.name}", "data.tokenizer")
        if not len(self.lengths):
            raise CorpusError(f"no document is left to train on: {self.report}")
        self.fingerprint = _fingerprint(store, self._pieces)
        #: By which the loss of each document's tokens counts; None: all alike.
        self.loss_weights: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sources(self) -> IntArray:
        """For each document the stored one that it is, or is a piece of."""
        return self._pieces.sources

    @property
    def source_tokens(self) -> IntArray:
        """Tokens of each stored document."""
        return np.asarray(self._store.reader.lengths, np.int64)

    def document(self, index: int) -> TokenArray:
        """All tokens of a document, a read-only view of the file where possible."""
        return self.slice(index, 0, int(self.lengths[index]))

    def slice(self, index: int, start: int, stop: int) -> TokenArray:
        """Tokens `start` to `stop` of a document."""
        assert 0 <= start <= stop <= self.lengths[index]
        offset = int(self._pieces.starts[index])
        source = int(self._pieces.sources[index])
        return self._store.reader.slice(source, offset + start, offset + stop)

    def gather(self, documents: IntArray, positions: IntArray) -> IntArray:
        """Token `positions[k]` of document `documents[k]` for every k, as int64."""
        assert np.all((positions >= 0) & (positions < self.lengths[documents]))
        pieces = self._pieces
        tokens = self._store.reader.gather(
            pieces.sources[documents], pieces.starts[documents] + positions
        )
        return tokens.astype(np.int64)

    @property
    def cache_folder(self) -> str | None:
        """The folder of the cache with its tokens; None of a pair that is read in place."""
        return self._store.folder

    def check(self) -> None:
        """Look whether the tokens are those that were opened; a few system calls.

        Raises:
            CorpusError: a file was written to since.
        """
        for file in self._store.mapped:
            file.check()

    def changes(self) -> list[str]:
        """What happened to files since, that leaves the tokens of this object as they are.

        Looks at every file of the corpus.
        """
        lost = [text for file in self._store.mapped if (text := file.lost())]
        return lost + differences(self._store.sources)

    def name(self, index: int) -> str:
        """How messages call a document: its file, line or row, and the piece if it was cut."""
        source, start = int(self._pieces.sources[index]), int(self._pieces.starts[index])
        name = self._store.name(source)
        if self.lengths[index] == self._store.reader.lengths[source]:
            return name
        return f"{name} tokens {start} to {start + int(self.lengths[index])}"

    def require_vocab(
        self, vocab_size: int, owner: str = "the model", remedy: str = "model.vocab_size"
    ) -> None:
        """Refuse a vocabulary that is too small for a token of this corpus.

        Raises:
            CorpusError: naming a document with the largest id.
        """
        if self.max_token_id >= vocab_size:
            where = self._store.name(self._store.summary.max_token_document)
            raise CorpusError(
                f"{where} holds the token id {self.max_token_id}, but {owner} has "
                f"{vocab_size} ids, 0 to {vocab_size - 1}; set {remedy} to the one that the "
                f"corpus was made for"
            )


def open_one_corpus(
    config: DataConfig,
    cache_dir: Path,
    progress: Progress | None = None,
    begun_with: str | None = None,
) -> Corpus:
    """Open the corpus of `config.corpus`, tokenising it first if the cache lacks it.

    Args:
        config: the `data` section of a run.
        cache_dir: where tokenised corpora are kept; made if it is not there.
        progress: called with bytes done and bytes in all while tokens are made or checked.
        begun_with: the `cache_folder` that a run which goes on has begun with; if it is still
            there, it is used although files may have changed, which `changes` tells.

    Raises:
        CorpusError: a path, file, line, token or document is refused; the text names it.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    store = open_store(config, tokenizer, Path(cache_dir), progress, begun_with)
    return Corpus(store, tokenizer, config)


def _apply_limit(store: TokenStore, config: DataConfig) -> _Pieces:
    full, limit = store.reader.lengths, config.max_document_tokens
    overlong = full > limit
    if config.overlong == "refuse" and overlong.any():
        first, count = int(np.argmax(overlong)), int(overlong.sum())
        raise CorpusError(
            f"{store.name(first)} has {int(full[first])} tokens, more than "
            f"data.max_document_tokens ({limit}); {count} of {len(full)} documents do and the "
            f"longest has {int(full.max())}; raise the limit to that, or set data.overlong to "
            f"'split' (cut them into several documents) or 'drop' (leave them out)"
        )
    if config.overlong == "split" and overlong.any():
        if limit < 2:
            raise CorpusError(
                "data.overlong 'split' needs data.max_document_tokens of 2 or more, got "
                f"{limit}: neighbouring pieces share a token"
            )
        # Whole documents are one piece of any length; the cut ones advance by limit - 1.
        counts = np.where(overlong, -(-(full - 1) // (limit - 1)), full > 0)
    else:
        counts = ((full > 0) & ~overlong).astype(np.int64)
    sources = np.repeat(np.arange(len(full)), counts)
    number = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * (limit - 1)
    return _Pieces(sources, starts, np.minimum(full[sources] - starts, limit))


def _report(
    store: TokenStore, tokenizer: Tokenizer, config: DataConfig, pieces: _Pieces
) -> CorpusReport:
    full = store.reader.lengths
    overlong = full > config.max_document_tokens
    dropped = config.overlong == "drop"
    num_empty = int((full == 0).sum())
    return CorpusReport(
        kind=store.kind,
        tokenizer=tokenizer.name,
        num_files=len(store.files),
        documents_read=len(full) - num_empty,
        tokens_read=int(full.sum()),
        empty_skipped=store.summary.num_empty + num_empty,
        longest_tokens=int(full.max(initial=0)),
        max_document_tokens=config.max_document_tokens,
        overlong=config.overlong,
        num_overlong=int(overlong.sum()),
        split_into=0 if dropped else int(overlong[pieces.sources].sum()),
        dropped=int(overlong.sum()) if dropped else 0,
        dropped_tokens=int(full[overlong].sum()) if dropped else 0,
        documents=len(pieces.lengths),
        tokens=int(pieces.lengths.sum()),
        cached=store.cached,
    )


def _fingerprint(store: TokenStore, pieces: _Pieces) -> str:
    digest = hashlib.sha256(f"corpus 1 {store.summary.digest}".encode())
    for part in (pieces.sources, pieces.starts, pieces.lengths):
        digest.update(part.astype("<i8").data)
    return digest.hexdigest()
