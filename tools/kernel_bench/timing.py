"""Device times, and the clock that the multiprocessors ran at meanwhile."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

#: Runs of which a median is taken, at least; milliseconds that they last, at least and at most.
MIN_RUNS, MIN_MS, MAX_MS = 11, 150, 3000


def time_ms(fn: Callable[[], Any]) -> float:
    """Median of repeated runs, by device events."""
    once = float(triton.testing.do_bench(fn, warmup=1, rep=1, return_mode="median"))
    lasting = min(max(MIN_MS, MIN_RUNS * once), MAX_MS)
    return float(
        triton.testing.do_bench(fn, warmup=max(30, 2 * once), rep=lasting, return_mode="median")
    )


class Clocks:
    """The multiprocessors' clock and the card's power, read beside a benchmark.

    A card at its power limit lowers its clock: the same kernel then takes longer, by a sixth on
    some cards. Figures are comparable at like clocks only.
    """

    def __init__(self) -> None:
        uuid = torch.cuda.get_device_properties(0).uuid  # type: ignore[attr-defined]
        command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "-lms", "20"]
        command += ["--format=csv,noheader,nounits", "-i", "GPU-" + str(uuid).removeprefix("GPU-")]
        self._reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._seen: list[tuple[float, float, float]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._reader.stdout is not None
        for line in self._reader.stdout:
            mhz, watts = (float(part) for part in line.split(","))
            self._seen.append((time.perf_counter(), mhz, watts))

    def since(self, start: float) -> tuple[float, float]:
        """Mean clock in MHz and power in watts from a `time.perf_counter` on; NaN if none seen."""
        seen = [entry for entry in self._seen if entry[0] >= start]
        if not seen:
            return float("nan"), float("nan")
        return statistics.mean(e[1] for e in seen), statistics.mean(e[2] for e in seen)

    def close(self) -> None:
        """Stop reading."""
        self._reader.terminate()
        self._reader.wait()
