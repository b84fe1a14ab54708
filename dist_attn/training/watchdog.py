"""Ends a run that no longer moves, and says which rank holds it up, where, and for how long."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from dist_attn.errors import NODE_ERROR_EXIT
from dist_attn.training.runtime import Runtime

logger = logging.getLogger(__name__)

#: Called with the step and what the main thread is about to do in it.
Mark = Callable[[int, str], None]


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
    """A thread beside the training loop of one rank.

    Every few seconds it leaves a beat in the store. When the main thread has not moved for
    `limit_s`, it reads everybody's: a rank that beats no more is stopped, dead or cut off; among
    the others the one that is furthest behind is what the rest waits for. Then the process prints
    the stacks of its threads and ends, because a thread that waits in a collective cannot be woken.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        nodes: tuple[str, ...],
        limit_s: float,
        on_stall: Callable[[str], None] | None = None,
    ) -> None:
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
        self._place = (0, -1, "start", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10 * self._interval_s)

    def mark(self, step: int, phase: str) -> None:
        """Say that the main thread goes on, and with what."""
        self._place = (self._place[0] + 1, step, phase, time.monotonic())

    def _watch(self) -> None:
        count = 0
        while not self._over.wait(self._interval_s):
            count += 1
            beat = self._now(count)
            reached = self._beat(beat)
            if beat.seconds > self._limit_s and not self._over.is_set():
                text = self._diagnosis(count) if reached else self._no_store()
                # The others finish theirs, from the store that rank 0 may keep.
                time.sleep((10 if self._rank == 0 else 5) * self._interval_s)
                self._on_stall(
                    f"rank {self._rank} waits in {beat.phase} of step {beat.step}: {text}"
                )
                return

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
def watching(runtime: Runtime, limit_s: float) -> Iterator[Mark]:
    """Watch over a block, where the ranks have a store; gives the function that marks progress."""
    if runtime.store is None:
        yield lambda step, phase: None
        return
    with Watchdog(runtime.store, runtime.rank, runtime.nodes, limit_s) as watchdog:
        yield watchdog.mark


def describe(before: list[Beat | None], after: list[Beat | None], nodes: tuple[str, ...]) -> str:
    """Say who holds a run up, from two readings of everybody's beats."""

    def name(rank: int) -> str:
        return f"rank {rank} on {nodes[rank]}"

    def place(beat: Beat | None) -> str:
        if beat is None:
            return "before its first step"
        return f"in {beat.phase} of step {beat.step} for {beat.seconds:.0f} s"

    silent = [r for r, (b, a) in enumerate(zip(before, after, strict=True)) if a is None or b == a]
    if silent:
        return "; ".join(
            f"{name(r)} gives no sign of life, last seen {place(after[r])}" for r in silent[:8]
        )
    beats = [a for a in after if a is not None]
    fewest = min(b.moves for b in beats)
    behind = [r for r, b in enumerate(beats) if b.moves == fewest]
    if len(behind) == len(beats):
        return f"every rank is alive and in the same place, {place(beats[0])}: the network is stuck"
    return "every rank is alive; behind the others: " + "; ".join(
        f"{name(r)}, {place(beats[r])}" for r in behind[:8]
    )


def _end(text: str) -> None:
    logger.error("%s", text)
    sys.stderr.write(f"[rank {os.environ.get('RANK', '?')}] stacks of this rank:\n")
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(NODE_ERROR_EXIT)
