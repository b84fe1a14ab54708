"""The rules that masks are composed of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.layout import IntArray, check_cu_seqlens
from dist_attn.masks.base import BoolArray, Mask


@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every query attends to every key."""

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return (q >= 0) & (k >= 0)


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """A query attends to itself and what is before it."""

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return k <= q


@dataclass(frozen=True, eq=False)
class Window(Mask):
    """A query attends to `left` tokens before it, itself, and `right` after it; -1: unlimited."""

    left: int
    right: int

    def __post_init__(self) -> None:
        if self.left < -1 or self.right < -1:
            raise PlanError(
                f"a window's sides are -1 (unlimited) or more, got {self.left}, {self.right}"
            )

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        allowed = (q >= 0) & (k >= 0)
        if self.left >= 0:
            allowed = allowed & (k >= q - self.left)
        if self.right >= 0:
            allowed = allowed & (k <= q + self.right)
        return allowed


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """A query attends to the keys of its own document.

    Attributes:
        cu_seqlens: boundaries of the documents in the stream, from 0 to its length; documents may
            be empty.
    """

    cu_seqlens: IntArray

    def __init__(self, cu_seqlens: Sequence[int] | IntArray) -> None:
        cu = check_cu_seqlens(cu_seqlens).copy()
        cu.setflags(write=False)
        object.__setattr__(self, "cu_seqlens", cu)

    @property
    def seq_len(self) -> int:
        """Tokens of the stream."""
        return int(self.cu_seqlens[-1])

    def document_of(self, positions: IntArray) -> IntArray:
        """Index of the document that holds each position."""
        return np.searchsorted(self.cu_seqlens, positions, side="right") - 1

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        return self.document_of(q) == self.document_of(k)
