"""Draws docs/benchmarks/kernels.png from the figures of `bench_kernels.py`.

python tools/plot_kernels.py docs/benchmarks/kernels.json docs/benchmarks/kernels.png
"""

from __future__ import annotations

import json
import sys
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

FIELD = "#3b6ea5", "#9db8d6"


def rates(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Forward and backward rate of each mask."""
    shown = [r for r in rows if r["peer"] == "hopper" and "stride" not in r["case"]]
    at = range(len(shown))
    for shift, part, color in ((-0.2, "forward", FIELD[0]), (0.2, "backward", FIELD[1])):
        values = [r[f"{part}_tflops"] for r in shown]
        bars = ax.bar([i + shift for i in at], values, 0.4, color=color, label=part)
        ax.bar_label(bars, fmt="%.0f", fontsize=7)
    ax.set_xticks(list(at), [r["case"] for r in shown], rotation=35, ha="right", fontsize=8)
    ax.set_ylabel("TFLOP/s on kept scores")
    ax.legend(frameon=False, fontsize=8)


def speedups(ax: Any, rows: list[dict[str, Any]]) -> None:
    """Forward and backward together against dense FlashAttention-2, by density."""
    dense = next(r for r in rows if r["peer"] == "fa2-dense")
    whole = dense["forward_ms"] + dense["backward_ms"]
    shown = [r for r in rows if r["peer"] == "hopper" and r["case"].startswith("s2-128k")]
    shown = sorted((r for r in shown if r["case"] != "s2-128k-128"), key=lambda r: r["density"])
    density = [100 * r["density"] for r in shown]
    gain = [whole / (r["forward_ms"] + r["backward_ms"]) for r in shown]
    ax.plot(density, gain, "o-", color=FIELD[0], label="measured")
    ax.plot(density, [100 / d for d in density], "--", color="0.6", label="1 / density")
    for row, x, y in zip(shown, density, gain, strict=True):
        stride = row["case"].partition("stride")[2] or "16"
        ax.annotate(f"stride {stride}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
    ax.set_xlabel("density, % of the causal triangle")
    ax.set_ylabel("times dense FlashAttention-2, 128k")
    ax.legend(frameon=False, fontsize=8)


def main() -> None:
    """Read the figures, write the picture."""
    with open(sys.argv[1], encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rates(left, rows)
    speedups(right, rows)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], dpi=110)


if __name__ == "__main__":
    main()
