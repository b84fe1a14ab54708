"""A count of what a rank has sent: calls and bytes by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """Calls and bytes that this rank has sent to others, by kind (`kv`, `dkv`, `all_to_all`, ...).

    What a rank keeps for itself is not counted.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one call of a kind."""
        self.calls[kind] += 1
        self.sent_bytes[kind] += num_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent_bytes.values())
