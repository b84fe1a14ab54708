"""A count of what a rank has sent, calls and bytes by kind, and of how long it stood still."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dist_attn.comm.stopwatch import Stopwatch


@dataclass
class Ledger:
    """Calls and bytes that this rank has sent to others, by kind (`kv`, `dkv`, `all_to_all`, ...).

    What a rank keeps for itself is not counted.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: Counter[str] = field(default_factory=Counter)
    #: Times the waits for messages, where it is given.
    waits: Stopwatch | None = None

    def add(self, kind: str, num_bytes: int) -> None:
        """Count one call of a kind."""
        self.calls[kind] += 1
        self.sent_bytes[kind] += num_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.sent_bytes.values())


def waiting(ledger: Ledger | None) -> contextlib.AbstractContextManager[object]:
    """A block in which computation stands still until messages have come."""
    if ledger is None or ledger.waits is None:
        return contextlib.nullcontext()
    return ledger.waits


@contextlib.contextmanager
def beside_the_computation(ledger: Ledger | None) -> Iterator[None]:
    """A block whose waits do not hold up the computation, and are not timed."""
    if ledger is None:
        yield
        return
    waits, ledger.waits = ledger.waits, None
    try:
        yield
    finally:
        ledger.waits = waits
