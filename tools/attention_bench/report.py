"""The table and the pictures of a run of the benchmark."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLUMNS = (
    *("mask", "tokens", "ranks", "strategy", "error", "error / one device"),
    *("forward ms", "backward ms", "TFLOP/s", "MiB sent", "peak MiB"),
)
#: A note of rows that are listed below the table.
NO_SUCH_MASK = "it has no such mask"


@dataclass(frozen=True)
class Result:
    """One row of the table; times over all ranks, bytes and memory of the rank with most.

    Attributes:
        error: largest difference over largest value, the worst of out, dq, dk and dv.
        growth: root mean square of the differences over one device's, the worst of the same.
    """

    mask: str
    strategy: str
    seq_len: int
    ranks: int
    error: float | None = None
    growth: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflops: float | None = None
    sent_mib: float | None = None
    peak_mib: float | None = None
    note: str = ""


def table(title: str, about: str, results: Sequence[Result]) -> str:
    """Return the table with what is needed to repeat it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    times = {"forward ms", "backward ms", "TFLOP/s"}
    timed = any(r.forward_ms for r in results)
    columns = [c for c in COLUMNS if timed or c not in times]
    lines = [
        f"# {title}",
        "",
        f"`{' '.join(sys.argv)}`, commit {commit or 'unknown'}, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        about,
        "",
        f"| {' | '.join(columns)} | |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for r in (r for r in results if r.note != NO_SUCH_MASK):
        speeds = [r.forward_ms, r.backward_ms, r.tflops] if timed else []
        numbers = [r.growth, *speeds, r.sent_mib, r.peak_mib]
        shown = ["-" if n is None else f"{n:.3g}" for n in numbers]
        error = "-" if r.error is None else f"{r.error:.1e}"
        head = [r.mask, str(r.seq_len), str(r.ranks), r.strategy, error]
        lines.append("| " + " | ".join([*head, *shown, r.note]) + " |")
    without = {(r.mask, r.strategy): None for r in results if r.note == NO_SUCH_MASK}
    if without:
        by_mask = {m: [s for n, s in without if n == m] for m, _ in without}
        listed = "; ".join(f"{m}: {', '.join(names)}" for m, names in by_mask.items())
        lines += ["", f"Not run, because the peer has no such mask: {listed}."]
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "an unknown processor"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw time, rate, bytes and memory of the most ranks at the greatest length."""
    right = [r for r in results if r.peak_mib is not None or r.forward_ms is not None]
    if not right:
        return
    ranks, seq_len = max(r.ranks for r in right), max(r.seq_len for r in right)
    rows = [r for r in right if r.ranks == ranks and r.seq_len == seq_len]
    masks = list(dict.fromkeys(r.mask for r in rows))
    names = ["MiB sent", "peak MiB"]
    if any(r.forward_ms for r in rows):
        names = ["ms", "TFLOP/s on the mask's area", *names]
    size = (3.2 * len(masks) + 1, 3 * len(names))
    figure, axes = plt.subplots(
        len(names), len(masks), figsize=size, layout="constrained", squeeze=False
    )
    for column, mask in enumerate(masks):
        some = [r for r in rows if r.mask == mask]
        if len(names) == 4:
            _bars(axes[0, column], some, lambda r: r.forward_ms, "forward")
            _bars(
                axes[0, column], some, lambda r: r.backward_ms, "backward", lambda r: r.forward_ms
            )
            _bars(axes[1, column], some, lambda r: r.tflops)
            axes[0, 0].legend()
        _bars(axes[-2, column], some, lambda r: r.sent_mib)
        _bars(axes[-1, column], some, lambda r: r.peak_mib)
        axes[0, column].set_title(mask)
        axes[-1, column].tick_params("x", rotation=90, labelsize=7)
        for axis in axes[:-1, column]:
            axis.set_xticklabels([])
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name)
    figure.suptitle(f"{seq_len} tokens, {ranks} ranks of one machine")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_errors(results: Sequence[Result], path: Path) -> None:
    """Draw how errors, over one device's, go with the number of ranks."""
    masks = list(dict.fromkeys(r.mask for r in results if r.growth is not None))
    if len({r.ranks for r in results}) < 2 or not masks:
        return
    figure, axes = plt.subplots(
        1, len(masks), figsize=(4 * len(masks) + 2, 4), layout="constrained", squeeze=False
    )
    for axis, mask in zip(axes[0], masks, strict=True):
        for name in dict.fromkeys(r.strategy for r in results if r.strategy != "local"):
            rows = [r for r in results if r.mask == mask and r.strategy == name and r.growth]
            points = [(r.ranks, r.growth) for r in rows]
            style = "-o" if name.split()[0] == name else "--x"
            axis.plot(*zip(*points, strict=True), style, label=name) if points else None
        axis.axhline(2, color="gray", linewidth=0.5)
        axis.set_yscale("log")
        axis.set_title(mask)
        axis.set_xlabel("ranks")
    axes[0, 0].set_ylabel("error / one device's")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=6, loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(
    axis: Axes,
    rows: Sequence[Result],
    value: Callable[[Result], float | None],
    label: str = "",
    bottom: Callable[[Result], float | None] = lambda r: 0.0,
) -> None:
    ours = ["tab:blue" if " " not in r.strategy else "tab:gray" for r in rows]
    heights, bottoms = [value(r) or 0.0 for r in rows], [bottom(r) or 0.0 for r in rows]
    alpha = 0.55 if label == "backward" else 1.0
    names = [r.strategy for r in rows]
    axis.bar(names, heights, bottom=bottoms, label=label, color=ours, alpha=alpha)
