"""The mask as data: an element predicate, its rows as sets of keys, composition, and its area."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_attn.layout import IntArray
from dist_attn.masks.parts import Part, count_per_row

BoolArray = npt.NDArray[np.bool_]
#: Rows for which sets of keys are made at a time.
ROWS_AT_A_TIME = 1 << 18


class Mask(ABC):
    """Which query of a stream may attend to which key, for each query head.

    A mask is frozen data. Its meaning is `allows`; `touched` and `full` must agree with it.
    """

    @abstractmethod
    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """Tell whether the query at position `q` may attend to the key at `k`, elementwise."""

    @abstractmethod
    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """Return keys that some query of first..last may attend to; exact where first == last.

        Args:
            first: int64 [n] first query position of each row.
            last: int64 [n] last query position, inclusive.
            head: the query head.
        """

    @abstractmethod
    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """Return keys that every query of first..last may attend to; they need not be all."""

    def check(self, seq_len: int) -> None:  # noqa: B027 - most rules fit any stream
        """Refuse a stream that the mask is not made for.

        Raises:
            PlanError: it is made for a stream of another length.
        """

    @property
    def exact_rows(self) -> bool:
        """Whether `touched` of a single query is exactly what it may attend to."""
        return True

    def pattern(self, head: int) -> Hashable:
        """Return what two heads have in common if and only if their masks are the same."""
        return 0

    def interval_pattern(self, head: int) -> Hashable:
        """Return what heads have in common whose parts differ in nothing but their key sets."""
        return self.pattern(head)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)

    def materialize(self, seq_len: int, head: int = 0) -> BoolArray:
        """Return the whole mask, bool [seq_len, seq_len]: for tests and pictures."""
        positions = np.arange(seq_len)
        allowed = self.allows(positions[:, None], positions[None, :], head)
        return np.broadcast_to(allowed, (seq_len, seq_len)).copy()

    def row_areas(self, positions: IntArray, seq_len: int, head: int = 0) -> IntArray:
        """Return how many keys each of the given queries attends to.

        Time and memory grow with the queries, or with the pairs where `exact_rows` does not hold.
        """
        keys = np.arange(0 if self.exact_rows else seq_len)
        rows_at_a_time = ROWS_AT_A_TIME if self.exact_rows else 1 + ROWS_AT_A_TIME // (seq_len + 1)
        counts = []
        for start in range(0, len(positions), rows_at_a_time):
            q = positions[start : start + rows_at_a_time]
            if self.exact_rows:
                counts.append(count_per_row(self.touched(q, q, head), len(q), seq_len))
            else:
                allowed = self.allows(q[:, None], keys[None], head)
                counts.append(np.broadcast_to(allowed, (len(q), seq_len)).sum(axis=1))
        return np.concatenate(counts) if counts else np.empty(0, dtype=np.int64)

    def area(self, seq_len: int, head: int = 0) -> int:
        """Return the exact number of allowed pairs of one head; see `row_areas`."""
        return int(self.row_areas(np.arange(seq_len), seq_len, head).sum())

    def total_area(self, seq_len: int, num_heads: int) -> int:
        """Return the exact number of allowed pairs of all heads."""
        areas: dict[Hashable, int] = {}
        total = 0
        for head in range(num_heads):
            pattern = self.pattern(head)
            if pattern not in areas:
                areas[pattern] = self.area(seq_len, head)
            total += areas[pattern]
        return total


@dataclass(frozen=True, eq=False)
class _Pair(Mask):
    left: Mask
    right: Mask

    def check(self, seq_len: int) -> None:
        """See `Mask`."""
        self.left.check(seq_len)
        self.right.check(seq_len)

    @property
    def exact_rows(self) -> bool:
        """See `Mask`."""
        return self.left.exact_rows and self.right.exact_rows

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return self.left.pattern(head), self.right.pattern(head)

    def interval_pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return self.left.interval_pattern(head), self.right.interval_pattern(head)


@dataclass(frozen=True, eq=False)
class And(_Pair):
    """Allowed by both."""

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.left.allows(q, k, head) & self.right.allows(q, k, head)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        left, right = (m.touched(first, last, head) for m in (self.left, self.right))
        return [a & b for a in left for b in right]

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        left, right = (m.full(first, last, head) for m in (self.left, self.right))
        return [a & b for a in left for b in right]


@dataclass(frozen=True, eq=False)
class Or(_Pair):
    """Allowed by either."""

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.left.allows(q, k, head) | self.right.allows(q, k, head)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self.left.touched(first, last, head) + self.right.touched(first, last, head)

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self.left.full(first, last, head) + self.right.full(first, last, head)
