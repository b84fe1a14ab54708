"""Documents of random tokens: what the training loop asks of a corpus."""

from __future__ import annotations

import numpy as np


class RandomCorpus:
    """Documents of given lengths; the tokens follow from their places."""

    def __init__(self, lengths: list[int], vocab_size: int) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.loss_weights = None
        self._vocab_size = vocab_size

    def check(self) -> None:
        """There are no files that could change."""

    def gather(self, documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (documents * 7919 + positions * 104729) % 1000003 % self._vocab_size
