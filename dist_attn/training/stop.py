"""A run that is asked to stop finishes its step and writes a checkpoint first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

#: What a scheduler sends before it takes a machine away: SLURM on cancellation and preemption, and
#: by `--signal=USR1@300` before the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: A process of `dist-attn` that gets it prints the stacks of its threads and goes on.
STACKS_SIGNAL = signal.SIGUSR2


class StopRequest:
    """Remembers that a stop signal came; as a context manager, from where to where it listens.

    Ranks are signalled at slightly different moments, or only some of them: the training loop asks
    all of them after each step, so that they stop after the same one. Once a signal came, further
    ones are ignored until the process ends: launchers repeat them.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def signal_name(self) -> str | None:
        """The signal that came, or None."""
        return None if self._signal is None else signal.Signals(self._signal).name

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if self._signal is None else signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Keep these signals from processes started in here; SLURM sends them to all of a task's.

    A signal for this process waits until the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, STACKS_SIGNAL))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
