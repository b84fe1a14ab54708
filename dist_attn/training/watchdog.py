"""Ends a run that no longer moves, and says which rank holds it up, where, and for how long."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dist_attn.errors import NODE_ERROR_EXIT, NodeError, Stopped, UserError
from dist_attn.training.stop import STOP_SIGNALS

logger = logging.getLogger(__name__)

#: Called with the step and what the main thread is about to do in it.
Mark = Callable[[int, str], None]
#: A rank that was told to stop shows its stacks when it has not moved for so long; torchrun kills
#: it after 30 s.
STACKS_AFTER_S = 10.0
#: The step of what comes before the first one.
SETUP = -1
#: Ends that every rank comes to together, with a message of their own.
_IN_ORDER = (UserError, NodeError, Stopped)


def no_mark(step: int, phase: str) -> None:
    """Mark nothing, where there is no watchdog."""


@dataclass(frozen=True)
class Beat:
    """A sign of life: the thread's count, and where the rank's main thread is since when."""

    count: int
    #: Marks so far; ranks that carry out the same plans pass the same marks.
    moves: int
    step: int
    phase: str
    seconds: float


class Watchdog:
    """A thread beside the main thread of one rank, from when the ranks have met to their end.

    Every few seconds it leaves a beat in the store. When the main thread has not moved for
    `limit_s`, it reads everybody's: a rank that beats no more is stopped, dead or cut off; among
    the others the one that is furthest behind is what the rest waits for. Then the process prints
    the stacks of its threads and ends, because a thread that waits in a collective cannot be woken.
    A rank that ends by an unforeseen error, such as a broken connection, says where all others were
    last seen. One that is told to stop and does not move, because it waits for a rank that is gone,
    shows its stacks before its launcher's patience ends.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        nodes: tuple[str, ...],
        limit_s: float,
        on_stall: Callable[[str], None] | None = None,
        stacks_after_s: float = STACKS_AFTER_S,
    ) -> None:
        self._stacks_after_s = stacks_after_s
        #: When a stop signal came; None before, and once stacks were shown.
        self._told_at: float | None = None
        self._signals: tuple[int, int] | None = None
        self._wakeup_before = -1
        self._interval_s = min(max(limit_s / 20, 0.1), 10.0)
        # The server ends with the last reference to it in its process.
        self._shared_store = store
        self._connected = True
        # A connection of its own: the main thread may wait on the other one for long.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=3 * self._interval_s))
        self._rank = rank
        self._nodes = nodes
        self._limit_s = limit_s
        self._on_stall = on_stall or _end
        self._place = (0, SETUP, "the start", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait for the main thread, which may stand in a collective; numbers
            # of signals come here at once.
            self._signals = os.pipe()
            for end in self._signals:
                os.set_blocking(end, False)
            self._wakeup_before = signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._thread.join(10 * self._interval_s)
        if self._signals is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._signals:
                os.close(end)
        if isinstance(error, Exception) and not isinstance(error, _IN_ORDER):
            logger.error(
                "rank %d fails in %s: %s; last seen were %s",
                self._rank, _where(self._now(0)), _first_line(error), self._last_seen(),
            )  # fmt: skip

    def _last_seen(self) -> str:
        try:
            beats = self._read() if self._connected else []
        except dist.DistError:
            beats = []
        others = [
            f"rank {rank} on {node} in {_where(beat)}" if beat else f"rank {rank} on {node} never"
            for rank, (node, beat) in enumerate(zip(self._nodes, beats, strict=False))
            if rank != self._rank
        ]
        return "; ".join(others[:64]) or f"none, because {self._no_store()}"

    def mark(self, step: int, phase: str) -> None:
        """Say that the main thread goes on, and with what."""
        self._place = (self._place[0] + 1, step, phase, time.monotonic())

    def _watch(self) -> None:
        count = 0
        while not self._over.wait(self._interval_s):
            count += 1
            beat = self._now(count)
            reached = self._beat(beat)
            self._heed_signals(beat)
            if beat.seconds > self._limit_s and not self._over.is_set():
                text = self._diagnosis(count) if reached else self._no_store()
                # The others finish theirs, from the store that rank 0 may keep.
                time.sleep((10 if self._rank == 0 else 5) * self._interval_s)
                self._on_stall(f"rank {self._rank} waits in {_where(beat)}: {text}")
                return

    def _heed_signals(self, beat: Beat) -> None:
        if self._signals is not None and not self._over.is_set():
            with contextlib.suppress(BlockingIOError):
                if set(os.read(self._signals[0], 64)) & set(STOP_SIGNALS):
                    self._told_at = time.monotonic()
        if self._told_at is None:
            return
        still_s = min(beat.seconds, time.monotonic() - self._told_at)
        if still_s > self._stacks_after_s:
            self._told_at = None
            logger.error(
                "rank %d is told to stop and has not moved for %.0f s: it waits in %s",
                self._rank, beat.seconds, _where(beat),
            )  # fmt: skip
            _show_stacks()

    def _now(self, count: int) -> Beat:
        moves, step, phase, since = self._place
        return Beat(count, moves, step, phase, time.monotonic() - since)

    def _beat(self, beat: Beat) -> bool:
        try:
            if self._connected:
                self._store.set(f"beat/{self._rank}", json.dumps(vars(beat)))
        except dist.DistError:
            self._connected = False  # For good: a broken connection does not come back.
        return self._connected

    def _no_store(self) -> str:
        node = f" ({self._nodes[0]})" if self._nodes else ""
        return f"rank 0{node}, or the launcher that keeps the run's store, does not answer"

    def _diagnosis(self, count: int) -> str:
        try:
            before = self._read()
            # Others beat on while this thread waits; so must this one.
            for extra in range(1, 5):
                time.sleep(self._interval_s)
                self._beat(self._now(count + extra))
            return describe(before, self._read(), self._nodes)
        except dist.DistError:
            return self._no_store()

    def _read(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(len(self._nodes))]
        there = [self._store.check([key]) for key in keys]
        found = iter(self._store.multi_get([k for k, t in zip(keys, there, strict=True) if t]))
        return [Beat(**json.loads(next(found))) if t else None for t in there]


@contextlib.contextmanager
def watching(
    store: dist.Store | None,
    rank: int,
    nodes: tuple[str, ...],
    limit_s: float,
    on_stall: Callable[[str], None] | None = None,
) -> Iterator[Mark]:
    """Watch over a block, where the ranks have a store; gives the function that marks progress."""
    if store is None:
        yield no_mark
        return
    with Watchdog(store, rank, nodes, limit_s, on_stall) as watchdog:
        yield watchdog.mark


def describe(before: list[Beat | None], after: list[Beat | None], nodes: tuple[str, ...]) -> str:
    """Say who holds a run up, from two readings of everybody's beats."""

    def name(rank: int) -> str:
        return f"rank {rank} on {nodes[rank]}"

    def place(beat: Beat | None) -> str:
        if beat is None:
            return "before the run began"
        return f"in {_where(beat)} for {beat.seconds:.0f} s"

    silent = [r for r, (b, a) in enumerate(zip(before, after, strict=True)) if a is None or b == a]
    if silent:
        return "; ".join(
            f"{name(r)} gives no sign of life, last seen {place(after[r])}" for r in silent[:8]
        )
    beats = [a for a in after if a is not None]
    fewest = min(b.moves for b in beats)
    behind = [r for r, b in enumerate(beats) if b.moves == fewest]
    if len(behind) == len(beats):
        return (
            f"every rank is alive and in the same place, {place(beats[0])}: the network is stuck, "
            f"or this takes longer than run.timeout_s; the stacks tell which"
        )
    return "every rank is alive; behind the others: " + "; ".join(
        f"{name(r)}, {place(beats[r])}" for r in behind[:8]
    )


def _where(beat: Beat) -> str:
    return beat.phase + (" before the first step" if beat.step < 0 else f" of step {beat.step}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no text'])[0]}"


def _end(text: str) -> None:
    logger.error("%s", text)
    _show_stacks()
    os._exit(NODE_ERROR_EXIT)


def _show_stacks() -> None:
    sys.stderr.write(f"[rank {os.environ.get('RANK', '?')}] stacks of this rank:\n")
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
