"""Several corpora as one, each with a weight of its losses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_attn.config import DataConfig, SourceConfig
from dist_attn.data.cache import Progress
from dist_attn.data.corpus import Corpus, FloatArray, open_one_corpus
from dist_attn.data.indexed import IntArray


@dataclass(frozen=True)
class MixtureReport:
    """What was read of each source."""

    parts: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.parts)


class MixedCorpus:
    """The documents of several sources, one source after the other.

    Attributes:
        lengths: int64 [num_documents].
        loss_weights: float32 [num_documents].
        vocab_size: the largest of the sources'.
        fingerprint: changes when that of any source, or their order, does.
    """

    def __init__(self, parts: Sequence[Corpus], sources: Sequence[SourceConfig]) -> None:
        self._parts = list(parts)
        self._names = [s.name for s in sources]
        self._firsts = np.cumsum([0, *(len(p) for p in parts)])
        self.lengths: IntArray = np.concatenate([p.lengths for p in parts])
        self.lengths.flags.writeable = False
        self.loss_weights: FloatArray | None = np.concatenate(
            [
                np.full(len(p), s.loss_weight, np.float32)
                for p, s in zip(parts, sources, strict=True)
            ]
        )
        self.vocab_size = max(p.vocab_size for p in parts)
        prints = "".join(p.fingerprint for p in parts)
        self.fingerprint = hashlib.sha256(f"mixture 1 {prints}".encode()).hexdigest()
        self.report = MixtureReport(
            tuple(
                f"{s.name} (losses x {s.loss_weight:g}): {p.report}"
                for p, s in zip(parts, sources, strict=True)
            )
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def sources(self) -> IntArray:
        """See `Corpus.sources`; counted through all sources."""
        firsts = np.cumsum([0, *(len(p.source_tokens) for p in self._parts)])
        return np.concatenate(
            [p.sources + first for p, first in zip(self._parts, firsts, strict=False)]
        )

    @property
    def source_tokens(self) -> IntArray:
        """See `Corpus.source_tokens`."""
        return np.concatenate([p.source_tokens for p in self._parts])

    def gather(self, documents: IntArray, positions: IntArray) -> IntArray:
        """See `Corpus.gather`."""
        which = np.searchsorted(self._firsts, documents, side="right") - 1
        tokens = np.zeros(len(documents), np.int64)
        for i in np.unique(which):
            mine = which == i
            tokens[mine] = self._parts[i].gather(documents[mine] - self._firsts[i], positions[mine])
        return tokens

    @property
    def cache_folder(self) -> str | None:
        """None: of several sources none is remembered; changed files are read anew, or refused."""
        return None

    def check(self) -> None:
        """See `Corpus.check`."""
        for part in self._parts:
            part.check()

    def changes(self) -> list[str]:
        """See `Corpus.changes`."""
        return [text for part in self._parts for text in part.changes()]

    def name(self, index: int) -> str:
        """See `Corpus.name`."""
        i = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return f"{self._names[i]}: {self._parts[i].name(index - int(self._firsts[i]))}"

    def require_vocab(self, vocab_size: int) -> None:
        """See `Corpus.require_vocab`."""
        for part in self._parts:
            part.require_vocab(vocab_size)


AnyCorpus = Corpus | MixedCorpus


def open_corpus(
    config: DataConfig,
    cache_dir: Path,
    progress: Progress | None = None,
    begun_with: str | None = None,
) -> AnyCorpus:
    """Open a corpus, or the several of `config.sources`, tokenising what the cache lacks.

    Args:
        config: the `data` section of a run.
        cache_dir: where tokenised corpora are kept; made if it is not there.
        progress: called with bytes done and bytes in all while tokens are made or checked.
        begun_with: see `open_one_corpus`; not used by several sources.

    Raises:
        CorpusError: a path, file, line, token or document is refused; the text names it.
    """
    if not config.sources:
        return open_one_corpus(config, cache_dir, progress, begun_with)
    parts = [
        open_one_corpus(
            config.model_copy(update={"corpus": source.corpus, "sources": []}), cache_dir, progress
        )
        for source in config.sources
    ]
    return MixedCorpus(parts, config.sources)
