"""Which documents make the next global batch.

The order depends on the seed, the epoch and the number of documents alone: not on the number of
ranks, nor on the version of any library. A batch is found from its position without going through
the ones before it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_attn.config import BatchConfig
from dist_attn.data.indexed import IntArray
from dist_attn.errors import CorpusError

_EPOCHS_KEPT = 2

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SamplerPosition:
    """Where the next batch begins; a checkpoint keeps this."""

    epoch: int = 0
    #: Documents of the epoch that were taken already.
    offset: int = 0


@dataclass(frozen=True)
class _Epoch:
    order: IntArray
    #: Tokens of the first k documents of the order, for k from 0.
    tokens: IntArray


class BatchSampler:
    """Deals out the documents of a corpus epoch by epoch, each once per epoch.

    A batch has `config.documents` documents, or takes documents in order until the next one would
    pass `config.tokens`. The last documents of an epoch share a batch with the first of the next.

    Args:
        lengths: tokens of each document.
        config: the size of a batch.
        seed: of the order.
        shuffle: whether the order differs from that of the corpus.
        begun: an epoch that was begun elsewhere, with the documents that are not to be dealt in it.
    """

    def __init__(
        self,
        lengths: IntArray,
        config: BatchConfig,
        seed: int,
        shuffle: bool = True,
        begun: tuple[int, BoolArray] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, np.int64)
        if not len(self._lengths) or self._lengths.min() < 1:
            raise CorpusError("batches need at least one document, and each at least one token")
        longest = int(self._lengths.max())
        if config.tokens is not None and longest > config.tokens:
            raise CorpusError(
                f"a document has {longest} tokens and fits no batch of data.batch.tokens "
                f"({config.tokens}); raise it to {longest} or lower data.max_document_tokens"
            )
        self._config = config
        self._seed = seed
        self._shuffle = shuffle
        self._begun = begun
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def start(self) -> SamplerPosition:
        """Where the first batch begins."""
        if self._begun is None:
            return SamplerPosition()
        epoch, used = self._begun
        return SamplerPosition(epoch + int(used.all()))

    def dealt(self, position: SamplerPosition) -> BoolArray:
        """Which documents were dealt in the epoch of a position, or left out of it."""
        found = np.ones(len(self._lengths), bool)
        found[self._epoch(position.epoch).order[position.offset :]] = False
        return found

    def batch(self, position: SamplerPosition) -> tuple[IntArray, SamplerPosition]:
        """Deal the batch that begins at a position; also returns where the next one begins."""
        epoch, offset = position.epoch, position.offset
        if epoch < self.start.epoch or not 0 <= offset < len(self._epoch(epoch).order):
            raise CorpusError(
                f"{position} lies outside this corpus of {len(self._lengths)} documents; resume "
                f"with the corpus that the checkpoint was made with"
            )
        left = self._config.documents or self._config.tokens
        assert left is not None
        parts = []
        while left > 0:
            this = self._epoch(epoch)
            stop, left = self._take(this, offset, left)
            parts.append(this.order[offset:stop])
            if stop < len(this.order):
                return np.concatenate(parts), SamplerPosition(epoch, stop)
            epoch, offset = epoch + 1, 0
        return np.concatenate(parts), SamplerPosition(epoch, offset)

    def _take(self, epoch: _Epoch, offset: int, left: int) -> tuple[int, int]:
        """Return the end of what a budget buys from an offset on, and the budget that remains."""
        if self._config.documents is not None:
            stop = min(offset + left, len(epoch.order))
            return stop, left - (stop - offset)
        bought = epoch.tokens[offset] + left
        stop = int(np.searchsorted(epoch.tokens, bought, side="right")) - 1
        return stop, int(bought - epoch.tokens[stop])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            count = len(self._lengths)
            order = permutation(count, self._seed, number) if self._shuffle else np.arange(count)
            if self._begun is not None and number == self._begun[0]:
                order = order[~self._begun[1][order]]
            tokens = np.concatenate([[0], np.cumsum(self._lengths[order])])
            self._epochs[number] = _Epoch(order, tokens)
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]


def permutation(count: int, seed: int, epoch: int) -> IntArray:
    """Shuffle the numbers 0 to count - 1, the same way everywhere.

    Numbers are sorted by a 64-bit hash of (seed, epoch, number), because NumPy reserves the right
    to change what its generators give for a seed.

    Source: the mixing function of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators").
    """
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(key + np.arange(count, dtype=np.uint64)), kind="stable")


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
