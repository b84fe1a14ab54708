"""How much memory one call takes at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


class Memory:
    """The peak of this process from here on, beside what it holds already."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
            return
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            # What was freed goes back, so that taking it again shows.
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _status_mib("VmRSS") or 0.0

    def peak_mib(self) -> float | None:
        """Return the peak, or None where the system does not tell."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self._before
        peak = _status_mib("VmHWM")
        return None if peak is None else max(peak - self._before, 0.0)


def _status_mib(key: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return None
