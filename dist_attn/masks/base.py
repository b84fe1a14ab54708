"""The mask as data: an element predicate, composition, and what follows from both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_attn.layout import IntArray

BoolArray = npt.NDArray[np.bool_]


class Mask(ABC):
    """Which query of a stream may attend to which key, for each head.

    A mask is frozen data. Its meaning is `allows`; everything else must agree with it.
    """

    @abstractmethod
    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """Tell whether the query at position `q` may attend to the key at `k`, elementwise."""

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def materialize(self, seq_len: int, head: int = 0) -> BoolArray:
        """Return the whole mask, bool [seq_len, seq_len]: for tests and pictures."""
        positions = np.arange(seq_len)
        allowed = self.allows(positions[:, None], positions[None, :], head)
        return np.broadcast_to(allowed, (seq_len, seq_len)).copy()


@dataclass(frozen=True, eq=False)
class And(Mask):
    """Allowed by both."""

    left: Mask
    right: Mask

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.left.allows(q, k, head) & self.right.allows(q, k, head)


@dataclass(frozen=True, eq=False)
class Or(Mask):
    """Allowed by either."""

    left: Mask
    right: Mask

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.left.allows(q, k, head) | self.right.allows(q, k, head)
