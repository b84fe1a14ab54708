"""Which rank is slower than the others at the same work, so that all of them wait for it."""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What one rank computed in one step."""

    #: Seconds of its forward passes, without those in which it stood still for messages.
    seconds: float = 0.0
    #: The plan's seconds of computation for the same micro-batches; only their shares count.
    planned_s: float = 0.0
    #: Micro-batches in which it had documents.
    micro_batches: int = 0


class SlowRanks:
    """Compares what each rank needs with what its share of the plan takes the others.

    The seconds of a fair share are fitted to all ranks over the last steps, as a constant per
    micro-batch and a rate on the plan's seconds; so neither the plan's idea of the hardware nor
    unequal shares matter. A rank is slow when it takes more than `factor` times as long for its
    share as the median rank, in `steps` steps in a row that gave it work, and until it was not in
    as many.
    """

    def __init__(self, factor: float, steps: int, nodes: Sequence[str], *, speaks: bool) -> None:
        self._factor = factor
        self._steps = steps
        self._nodes = nodes
        self._speaks = speaks
        self._history: deque[_Rows] = deque(maxlen=steps)
        #: Steps in a row in which a rank was what it is not called (yet).
        self._in_a_row: dict[int, int] = {}
        self._named: set[int] = set()

    def judge(self, step: int, works: Sequence[Work]) -> tuple[int, float]:
        """Take in a step; warn of a rank that has become slow, and say so when it recovers.

        Args:
            step: the step.
            works: of every rank.

        Returns:
            The slowest rank of the step, and its time for its share over the median rank's.
        """
        rows = np.array([[w.micro_batches, w.planned_s, w.seconds] for w in works], np.float64)
        there = np.flatnonzero((rows[:, 0] > 0) & (rows[:, 2] > 0))
        if len(there) < 2:
            return 0, 1.0
        self._history.append(rows[there])
        expected = rows[there, :2] @ _fit(np.concatenate(self._history))
        shares = rows[there, 2] / np.maximum(expected, 1e-12)
        # The lower one of two: half of all ranks may be slow.
        ratios = shares / statistics.median_low(shares.tolist())
        for rank, ratio in zip(there.tolist(), ratios.tolist(), strict=True):
            self._count(step, rank, ratio)
        slowest = int(ratios.argmax())
        return int(there[slowest]), float(ratios[slowest])

    def _count(self, step: int, rank: int, ratio: float) -> None:
        changed = (ratio > self._factor) != (rank in self._named)
        self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if changed else 0
        if self._in_a_row[rank] < self._steps:
            return
        self._in_a_row[rank] = 0
        self._named ^= {rank}
        if rank not in self._named:
            self._say("step %d: %s is as quick as the others again", step, self._name(rank))
            return
        self._say(
            "WARNING: step %d: %s is slow: %.1f times the median rank's time for its share of the "
            "computation, more than %g times in each of its last %d steps; the others wait for it. "
            "Look at its clocks, temperature and what else runs there, or check its node with "
            "`dist-attn preflight`",
            step, self._name(rank), ratio, self._factor, self._steps,
        )  # fmt: skip

    def _say(self, text: str, *values: object) -> None:
        if self._speaks:
            logger.warning(text, *values)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._nodes[rank]}" if self._nodes else f"rank {rank}"


def _fit(rows: _Rows) -> npt.NDArray[np.float64]:
    """Seconds per micro-batch and per planned second, with the least relative errors."""
    scaled = rows[:, :2] / rows[:, 2:]
    ones = np.ones(len(rows))
    both, *_ = np.linalg.lstsq(scaled, ones, rcond=None)
    if (both >= 0).all():
        return np.asarray(both)
    # One alone: the better one of the two that are left.
    found = []
    for column in (0, 1):
        x = scaled[:, column]
        alone = np.zeros(2)
        alone[column] = float(x @ ones) / max(float(x @ x), 1e-30)
        found.append((float(((scaled @ alone - 1) ** 2).sum()), alone))
    return min(found, key=lambda pair: pair[0])[1]
