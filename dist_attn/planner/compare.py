"""Several plans side by side: batches, masks, clusters, or rules."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from dist_attn.planner.page import drawing
from dist_attn.planner.plan import Plan
from dist_attn.planner.preview import seconds_text
from dist_attn.planner.schedule import spans

_NAME_WIDTH = 16


@dataclass(frozen=True)
class Case:
    """A plan with a name to tell it by, and the best static plan for the same."""

    name: str
    plan: Plan
    static: Plan | None


@dataclass(frozen=True)
class Shares:
    """Where all ranks' time goes; adds up to one."""

    compute: float
    communication: float
    idle: float

    @classmethod
    def of(cls, plan: Plan) -> Shares:
        """Those of a plan. Overheads count as computation."""
        total = plan.predicted_s * plan.world_size
        if not total:
            return cls(1.0, 0.0, 0.0)
        busy = sum(m.overhead_s for m in plan.micro_batches) * plan.world_size
        sent = 0.0
        for span in spans(plan):
            own = span.seconds * span.num_ranks
            busy += own
            # Of uneven shares, as at the group's slowest rank.
            sent += own * (span.group.communication_s / (span.group.time_s or 1.0))
        return cls((busy - sent) / total, sent / total, 1 - busy / total)


def comparison(cases: list[Case]) -> Table:
    """One row per case; fits 80 columns, with numbers in place of names that are long."""
    if any(len(case.name) > _NAME_WIDTH for case in cases):
        cases = [replace(case, name=str(number)) for number, case in enumerate(cases, start=1)]
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("plan", no_wrap=True)
    for name in ("ranks", "docs", "tokens", "mb", "time", "gap", "comp", "comm", "idle", "static"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(*_row(case))
    return table


def legend(cases: list[Case]) -> list[str]:
    """What the numbers of `comparison` stand for; nothing where it names the cases."""
    if all(len(case.name) <= _NAME_WIDTH for case in cases):
        return []
    return [f"{number}: {case.name}" for number, case in enumerate(cases, start=1)]


def comparison_page(cases: list[Case], folders: list[Path]) -> str:
    """HTML: the table and every timeline on one scale of time, with links to the plans' pages."""
    longest = max(c.plan.predicted_s for c in cases) or 1.0
    head: tuple[str, ...] = (
        "plan",
        "ranks",
        "documents",
        "tokens",
        "micro-batches",
        "time",
        "gap to bound",
    )
    head += ("compute", "communication", "idle", "static / planned")
    rows, pictures = [], []
    for case, folder in zip(cases, folders, strict=True):
        cells = _row(case)
        link = f'<a href="{html.escape(folder.name)}/plan.html">{html.escape(case.name)}</a>'
        rows.append("<tr><td>" + "<td>".join((link, *map(html.escape, cells[1:]))))
        width = 100 * case.plan.predicted_s / longest
        height = max(min(case.plan.world_size * 4.0, 260.0), 60.0)
        pictures.append(
            f"<h2>{html.escape(case.name)}: {seconds_text(case.plan.predicted_s)}</h2>"
            f'<svg style="width:{width:.2f}%;height:{height:g}px" preserveAspectRatio="none" '
            f'viewBox="0 0 1000 {height:g}"><rect width="1000" height="{height:g}" '
            f'fill="#eee"/>{drawing(case.plan, height, labels=False)}</svg>'
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Plans</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem}"
        "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;"
        "font-size:.85rem}th,td{text-align:right;padding:.25rem .5rem;border-bottom:1px solid #eee}"
        "td:first-child,th:first-child{text-align:left}h2{font-size:1rem;margin:1rem 0 .2rem}"
        "svg{border:1px solid #bbb;display:block}svg .g{stroke:#444;stroke-width:.5;"
        "vector-effect:non-scaling-stroke}</style></head><body><h1>Plans side by side</h1><table>"
        f"<tr><th>{'<th>'.join(head)}{''.join(rows)}</table>{''.join(pictures)}"
        "<p>All timelines have one scale of time; grey is idle, colours are degrees.</p>"
        "</body></html>\n"
    )


def _row(case: Case) -> tuple[str, ...]:
    plan, shares = case.plan, Shares.of(case.plan)
    static = f"{case.static.predicted_s / plan.predicted_s:.2f}x" if case.static else "-"
    return (
        case.name,
        str(plan.world_size),
        str(len(plan.lengths)),
        _count(sum(plan.lengths)),
        str(len(plan.micro_batches)),
        seconds_text(plan.predicted_s),
        f"{plan.gap:.1%}",
        f"{shares.compute:.0%}",
        f"{shares.communication:.0%}",
        f"{shares.idle:.0%}",
        static,
    )


def _count(number: int) -> str:
    for unit, size in (("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
