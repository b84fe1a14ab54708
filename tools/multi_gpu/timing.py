"""Timing over ranks, a time budget, and the tables of a report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

#: Calls, and seconds of them, before the first that counts: cuDNN takes a shape over from flash
#: attention only when it has seen enough of it, which is some 40 calls at 32K tokens.
WARM_UP = 6
WARM_UP_S = 1.2
#: Times that a call and its ideal are measured in turn.
ROUNDS = 3


class Clock:
    """How much of the time budget is left."""

    def __init__(self, budget_s: float) -> None:
        self._start = time.monotonic()
        self._budget_s = budget_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left_s(self) -> float:
        """Seconds left on this rank."""
        return self._budget_s - self.elapsed_s

    def allows(self, seconds: float, keep_s: float = 0.0) -> bool:
        """Whether so much is left on rank 0, which decides for all, beside what is to be kept."""
        answer = torch.tensor(float(self.left_s - keep_s > seconds), device="cuda")
        dist.broadcast(answer, 0)
        return bool(answer.item())


class Report:
    """Rows by table, printed as they come and together at the end."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []

    def add(self, table: str, **row: Any) -> None:
        """Add a row; its keys are the columns."""
        self.rows.setdefault(table, []).append(row)
        if self._speaks:
            print(table, " ".join(f"{k}={_shown(v)}" for k, v in row.items()), flush=True)

    def note(self, text: str) -> None:
        """Add a remark, such as what was left out."""
        self.notes.append(text)
        if self._speaks:
            print("note:", text, flush=True)

    def text(self, header: list[str]) -> str:
        """Everything as Markdown."""
        lines = list(header)
        for table, rows in self.rows.items():
            columns = list(dict.fromkeys(k for row in rows for k in row))
            lines += [f"## {table}", "", "| " + " | ".join(columns) + " |"]
            lines.append("|---" * len(columns) + "|")
            lines += ["| " + " | ".join(_shown(r.get(c)) for c in columns) + " |" for r in rows]
            lines.append("")
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"


def seconds_of(
    call: Callable[[], Any], *, least_s: float = 0.12, repeats: int = 3, warm_up: int = 2
) -> float:
    """Return the median over repeats of the mean seconds of a call, on the slowest rank.

    Ranks start each repeat together. A repeat runs the call as often as `least_s` asks for.

    Collective: by all ranks.
    """
    for _ in range(warm_up):
        call()
    once = _timed(call, 1)
    count = max(1, min(50, int(least_s / max(once, 1e-6))))
    return statistics.median(_timed(call, count) for _ in range(repeats))


def warm_up(call: Callable[[], Any]) -> None:
    """Call until everything that is chosen, planned or compiled on the way is.

    Collective: by all ranks, which call equally often.
    """
    for _ in range(WARM_UP):
        call()
    for _ in range(min(200, round(WARM_UP_S / _timed(call, 1)))):
        call()


@dataclass(frozen=True)
class Paired:
    """Seconds of a call and of the ideal beside it, and how many times the ideal's seconds it is.

    Attributes:
        seconds: median over the rounds.
        ideal_s: the ideal's, in the same rounds.
        of_ideal: median of the rounds' own ratios, ideal over call.
    """

    seconds: float
    ideal_s: float
    of_ideal: float


def paired_seconds(
    call: Callable[[], Any], ideal: Callable[[], Any], share: int, *, least_s: float = 0.12
) -> Paired:
    """Time a call and, in turn with it, an ideal of `share` times the work.

    A GPU under load changes its clock by a fifth within a second, by power and heat. So what is
    compared is measured in turn, each for as long as the other one. Both are warm before.

    Collective: by all ranks.
    """
    once, once_ideal = _timed(call, 1), _timed(ideal, 1)
    most = max(least_s, once, once_ideal)
    count, count_ideal = (max(1, min(100, round(most / x))) for x in (once, once_ideal))
    rounds = [(_timed(ideal, count_ideal), _timed(call, count)) for _ in range(ROUNDS)]
    return Paired(
        statistics.median(s for _, s in rounds),
        statistics.median(i / share for i, _ in rounds),
        statistics.median(i / share / s for i, s in rounds),
    )


def _timed(call: Callable[[], Any], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    torch.cuda.synchronize()
    seconds = torch.tensor(start.elapsed_time(end) / 1e3 / count, device="cuda")
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value)
