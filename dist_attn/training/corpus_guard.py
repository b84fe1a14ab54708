"""What becomes of a run whose corpus changes under it."""

from __future__ import annotations

import logging

from dist_attn.data import AnyCorpus

logger = logging.getLogger(__name__)

_SHOWN = 3


class CorpusGuard:
    """Tells of changes that do a run no harm; those that do end it at its next step.

    Texts are tokenised once, before the first step: what happens to them afterwards leaves the run
    as it is, and so does removing a file that is open.
    """

    def __init__(self, corpus: AnyCorpus, *, speaks: bool) -> None:
        self._corpus = corpus
        self._speaks = speaks
        self._told: set[str] = set()

    def tell(self) -> None:
        """Look at every file of the corpus, and warn of what is new."""
        if not self._speaks:
            return
        new = [text for text in self._corpus.changes() if text not in self._told]
        if not new:
            return
        self._told.update(new)
        more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
        logger.warning(
            "WARNING: the corpus has changed since this run began: %s%s. The run goes on with the "
            "tokens that it began with%s",
            "; ".join(new[:_SHOWN]), more, self._where(),
        )  # fmt: skip

    def _where(self) -> str:
        folder = self._corpus.cache_folder
        if folder is None:
            return "; it can be resumed once the files are back"
        return f", from {folder} in the cache, and can be resumed for as long as that is there"
