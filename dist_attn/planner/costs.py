"""What the planner asks of a cost model, and the groups, devices and links that it asks about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupKind:
    """All that a group's cost depends on beside its documents."""

    degree: int
    strategy: str
    #: Kind of device, or -1: any, as slow and as small as the weakest.
    pool: int = 0
    crosses_nodes: bool = False


class Costs(Protocol):
    """What the planner asks of a cost model."""

    def allows(self, kind: GroupKind) -> bool:
        """Whether the model can be run by such groups."""

    def fixed_s(self, kind: GroupKind) -> float:
        """Seconds of a group before its first token."""

    def compute_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Seconds that each document adds to its group by computation."""

    def communication_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Seconds that each document adds by communication that computation does not hide."""

    def linear_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """The part of `compute_s` that is not attention."""

    def exchange_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Seconds of each document's messages, hidden or not."""

    def overlap(self, kind: GroupKind) -> float:
        """Share of a document's attention behind which its messages hide."""

    def capacity_tokens(self, kind: GroupKind) -> int:
        """Tokens that one rank of such a group can hold."""

    def memory_bytes(self, tokens: int) -> int:
        """Bytes of a rank that holds so many tokens."""

    def fingerprint(self) -> str:
        """A short hash of the coefficients."""


@dataclass(frozen=True)
class DeviceRates:
    """Fitted or derived rates of one kind of device."""

    #: Forward and backward of everything but attention, per token; of attention, per attended pair.
    linear_s_per_token: float
    attention_s_per_pair: float
    memory_bytes: int
    #: A configured cap on a rank's tokens.
    max_tokens: int | None = None


@dataclass(frozen=True)
class LinkRates:
    """A link as a group's exchanges see it."""

    bytes_per_s: float
    latency_s: float
