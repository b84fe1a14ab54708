"""A stream beside the one that computes, for packing, exchanging and unpacking."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from dist_attn.comm.ledger import Ledger, beside_the_computation, waiting

T = TypeVar("T")


@dataclass(frozen=True)
class Ticket(Generic[T]):
    """What is being made beside the computation."""

    _result: T
    _done: torch.cuda.Event | None
    _ledger: Ledger | None = None

    def result(self) -> T:
        """Return it; what is computed from here on waits for it."""
        if self._done is not None:
            with waiting(self._ledger):
                torch.cuda.current_stream().wait_event(self._done)
        return self._result


class SideStream:
    """Work in the order in which it is given, beside what is computed. On a CPU, at once.

    All of it lies between the making of the object and `finish`, both in one function: the stream
    waits for what was computed before, and is waited for in the end. Until then all work is kept
    with the tensors that it reads, so that no memory of either stream is used anew too early. A
    ledger times how long the computation stands still for it, and not what it overlaps with.
    """

    def __init__(self, device: torch.device, ledger: Ledger | None = None) -> None:
        self._ledger = ledger
        self._stream = _stream(device) if device.type == "cuda" else None
        self._held: list[Any] = []
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def run(self, work: Callable[[], T]) -> Ticket[T]:
        """Start what needs all that was computed so far."""
        if self._stream is None:
            return Ticket(work(), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return self.run_at_once(work)

    def run_at_once(self, work: Callable[[], T]) -> Ticket[T]:
        """Start what needs nothing that was computed since this object was made."""
        if self._stream is None:
            return Ticket(work(), None)
        with torch.cuda.stream(self._stream):
            with beside_the_computation(self._ledger):
                result = work()
            self._held.append((work, result))
            return Ticket(result, self._stream.record_event(), self._ledger)

    def finish(self) -> None:
        """Let what is computed from here on wait for everything."""
        if self._stream is not None:
            with waiting(self._ledger):
                torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._held.clear()


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
