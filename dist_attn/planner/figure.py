"""The timeline of a plan as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dist_attn.planner.colours import OVERHEAD, degree_colour
from dist_attn.planner.plan import Plan
from dist_attn.planner.schedule import Span, group_starts, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_IDLE = "#d9d9d9"


def figure(plan: Plan, width_in: float = 10.0) -> Figure:
    """Draw ranks as rows, time to the right, groups as blocks with their degree, idle hatched."""
    height = min(max(2.2 + 0.11 * plan.world_size, 3.2), 9.0)
    fig = Figure(figsize=(width_in, height), layout="constrained")
    axes = fig.add_subplot()
    end = plan.predicted_s or 1.0
    _draw_idle(axes, plan.world_size, end)
    overheads = _draw_overheads(axes, plan)
    largest: dict[int, Span] = {}
    for span in spans(plan):
        _draw(axes, plan, span)
        known = largest.get(span.number)
        if known is None or span.num_ranks > known.num_ranks:
            largest[span.number] = span
    for span in largest.values():
        _label(axes, plan, span)
    if plan.synchronisation == "micro_batch":
        for micro_batch, starts in zip(plan.micro_batches, group_starts(plan), strict=True):
            axes.axvline(starts[0] + micro_batch.time_s, color="#404040", linewidth=0.8)
    degrees = {g.degree for m in plan.micro_batches for g in m.groups}
    axes.set_xlim(0, end)
    axes.set_ylim(plan.world_size, 0)
    axes.set_xlabel("predicted time (s)")
    axes.set_ylabel("rank")
    step = max(1, plan.world_size // 16)
    ticks = range(0, plan.world_size, step)
    axes.set_yticks([t + 0.5 for t in ticks], [str(t) for t in ticks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{len(plan.lengths)} documents, {sum(plan.lengths):,} tokens on {plan.world_size} ranks: "
        f"{plan.predicted_s:.3g} s, {plan.gap:.1%} above the lower bound",
        fontsize=10,
        loc="left",
    )
    legend = [
        Patch(facecolor=degree_colour(d), edgecolor="#404040", linewidth=0.4, label=f"degree {d}")
        for d in sorted(degrees)
    ]
    if overheads:
        legend.append(Patch(facecolor=OVERHEAD, label="overhead"))
    legend.append(Patch(facecolor="white", edgecolor=_IDLE, hatch="////", label="idle"))
    fig.legend(handles=legend, loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    return fig


def _draw_idle(axes: Axes, world_size: int, end: float) -> None:
    axes.add_patch(
        Rectangle(
            (0, 0),
            end,
            world_size,
            facecolor="white",
            edgecolor=_IDLE,
            hatch="////",
            linewidth=0,
        )
    )


def _draw_overheads(axes: Axes, plan: Plan) -> bool:
    """What micro-batches with `free` placement cost beside their groups; whether there is any."""
    found = False
    for micro_batch, starts in zip(plan.micro_batches, group_starts(plan), strict=True):
        if micro_batch.overhead_s > 0:
            corner = (starts[0], 0)
            size = (micro_batch.overhead_s, plan.world_size)
            axes.add_patch(Rectangle(corner, *size, facecolor=OVERHEAD, linewidth=0))
            found = True
    return found


def _draw(axes: Axes, plan: Plan, span: Span) -> None:
    axes.add_patch(
        Rectangle(
            (span.start_s, span.first_rank),
            span.seconds,
            span.num_ranks,
            facecolor=degree_colour(span.group.degree),
            edgecolor="#404040",
            linewidth=0.4 if plan.world_size <= 128 and not span.group.rank_s else 0.1,
        )
    )


def _label(axes: Axes, plan: Plan, span: Span) -> None:
    # Where it can be read.
    if span.num_ranks * 64 >= plan.world_size and span.seconds > 0.025 * (plan.predicted_s or 1.0):
        axes.text(
            span.start_s + span.seconds / 2,
            span.first_rank + span.num_ranks / 2,
            str(span.group.degree),
            ha="center",
            va="center",
            fontsize=7 if span.num_ranks > 1 or plan.world_size <= 32 else 5,
        )
