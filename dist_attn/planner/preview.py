"""A plan to look at: terminal table, picture, page and JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_attn.planner.figure import figure
from dist_attn.planner.levels import strategy_letters
from dist_attn.planner.page import page
from dist_attn.planner.plan import Group, Plan
from dist_attn.planner.schedule import busy_share

__all__ = ["figure", "page", "print_plan", "ranks_text", "write_preview"]


def print_plan(plan: Plan, static: Plan | None, console: Console, max_rows: int = 60) -> None:
    """Print the groups and the summary; fits 80 columns.

    Args:
        plan: the plan.
        static: the best static plan to compare with, or None when none exists.
        console: where to print.
        max_rows: groups shown; equal neighbours are joined first, the rest is counted.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in ("mb", "group", "deg", "ranks", "docs", "tokens", "compute", "comm", "memory"):
        left = name in ("ranks",)
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    rows = _rows(plan)
    for row in rows[:max_rows]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > max_rows:
        console.print(Text(f"... and {len(rows) - max_rows} more rows; all are in plan.json"))
    for line in summary(plan, static):
        console.print(Text(line))


def summary(plan: Plan, static: Plan | None) -> list[str]:
    """Predicted time, bound and comparison in a few lines."""
    tokens = sum(plan.lengths)
    busy = busy_share(plan)
    lines = [
        f"{len(plan.lengths)} documents, {tokens:,} tokens, {plan.world_size} ranks, "
        f"{len(plan.micro_batches)} micro-batches",
        f"predicted step {seconds_text(plan.predicted_s)}  lower bound "
        f"{seconds_text(plan.lower_bound_s)}  gap {plan.gap:.1%}  ranks busy {busy:.1%}",
    ]
    if plan.placement == "free":
        lines.append(
            "free placement: a rank may be in several groups; times are its slowest rank's"
        )
    if static is None:
        lines.append("no single static degree can hold this batch")
    else:
        degree = static.micro_batches[0].groups[0].degree
        lines.append(
            f"best static degree {degree}: {seconds_text(static.predicted_s)}, the plan is "
            f"{static.predicted_s / plan.predicted_s:.2f} times as fast"
        )
    if plan.solver.time_limit_reached:
        lines.append("the time limit ended the search; planner.time_limit_s gives it more")
    lines.append(f"solved in {seconds_text(plan.solver.seconds)}")
    return lines


def write_preview(plan: Plan, static: Plan | None, out: str | Path) -> list[Path]:
    """Write plan.json, plan.png and plan.html into a folder."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "plan.json", folder / "plan.png", folder / "plan.html"]
    plan.save(files[0])
    figure(plan).savefig(files[1], dpi=144)
    files[2].write_text(page(plan, static), encoding="utf-8")
    return files


def ranks_text(ranks: tuple[int, ...]) -> str:
    """Ranks as intervals: 0-7 or 3,5-6."""
    parts: list[list[int]] = []
    for r in sorted(ranks):
        if parts and parts[-1][1] == r - 1:
            parts[-1][1] = r
        else:
            parts.append([r, r])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def seconds_text(seconds: float) -> str:
    """Seconds in three digits with a fitting unit."""
    if seconds >= 100:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms"


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    rows = []
    for m, micro_batch in enumerate(plan.micro_batches):
        index = 0
        for alike in _runs(list(micro_batch.groups)):
            first = index == 0
            rows.append(_row(str(m) if first else "", index, alike))
            index += len(alike)
    return rows


def _runs(groups: list[Group]) -> list[list[Group]]:
    """Neighbouring single ranks are shown as one row; larger groups stand alone."""
    runs: list[list[Group]] = []
    for group in groups:
        if runs and group.degree == 1 and runs[-1][0].degree == 1:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _row(micro_batch: str, index: int, groups: list[Group]) -> tuple[str, ...]:
    many = len(groups) > 1
    first = groups[0]
    degree = f"{len(groups)}x{first.degree}" if many else str(first.degree)
    if first.degree > 1:
        degree += strategy_letters(first.strategy)
    ranks = ranks_text(tuple(r for g in groups for r in g.ranks))
    return (
        micro_batch,
        f"{index}-{index + len(groups) - 1}" if many else str(index),
        degree,
        ranks if len(ranks) <= 16 else ranks[:15] + "…",
        str(sum(len(g.documents) for g in groups)),
        f"{sum(g.tokens for g in groups):,}",
        seconds_text(max(g.compute_s for g in groups)),
        seconds_text(max(g.communication_s for g in groups)),
        f"{max(g.memory_bytes for g in groups) / 2**30:.3g} GiB",
    )
