"""Seconds of intervals, of the host's clock on CPUs and of the device's stream on GPUs."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Measures the intervals in which it is entered; they do not nest."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []

    def __enter__(self) -> Stopwatch:
        self._mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mark()

    def __len__(self) -> int:
        return len(self._marks) // 2

    def seconds(self) -> list[float]:
        """Every interval so far; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return [_between(a, b) for a, b in pairs]

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())


def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(second, float):
        return float(second) - float(first)  # type: ignore[arg-type]
    return float(first.elapsed_time(second)) / 1e3
