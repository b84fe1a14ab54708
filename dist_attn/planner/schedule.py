"""When each group of a plan starts, under either synchronisation.

`micro_batch`: all ranks wait for the slowest group of every micro-batch (ZeRO-3 gathers parameters
there). `step`: ranks meet only at the optimizer step; a group starts as soon as its own ranks are
free, in the order in which the plan lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_attn.planner.plan import Group, MicroBatch, Plan


def group_starts(plan: Plan) -> list[list[float]]:
    """Seconds at which each group of each micro-batch starts."""
    starts: list[list[float]] = []
    if plan.synchronisation == "micro_batch":
        now = 0.0
        for micro_batch in plan.micro_batches:
            starts.append([now] * len(micro_batch.groups))
            now += micro_batch.time_s
        return starts
    ready = [0.0] * plan.world_size
    for micro_batch in plan.micro_batches:
        row = []
        for group in micro_batch.groups:
            start = max(ready[r] for r in group.ranks)
            for r in group.ranks:
                ready[r] = start + group.time_s
            row.append(start)
        starts.append(row)
    return starts


@dataclass(frozen=True)
class Span:
    """Neighbouring ranks that work on a group at the same time."""

    group: Group
    #: Of the group among all groups of the plan.
    number: int
    first_rank: int
    num_ranks: int
    start_s: float
    seconds: float


def spans(plan: Plan) -> Iterator[Span]:
    """Who works on what when. With `free` placement every rank has times of its own."""
    number = 0
    for micro_batch, starts in zip(plan.micro_batches, group_starts(plan), strict=True):
        ready = dict.fromkeys(range(plan.world_size), micro_batch.overhead_s)
        for group, start in zip(micro_batch.groups, starts, strict=True):
            if group.rank_s:
                for rank, seconds in zip(group.ranks, group.rank_s, strict=True):
                    yield Span(group, number, rank, 1, start + ready[rank], seconds)
                    ready[rank] += seconds
            else:
                for first, count in blocks(group.ranks):
                    yield Span(group, number, first, count, start, group.time_s)
            number += 1


def blocks(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranks as (first, count) intervals."""
    found: list[tuple[int, int]] = []
    for r in sorted(ranks):
        if found and sum(found[-1]) == r:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((r, 1))
    return found


def busy_share(plan: Plan) -> float:
    """Share of all ranks' time that is not spent waiting for the slowest."""
    used = sum(span.seconds * span.num_ranks for span in spans(plan))
    used += sum(m.overhead_s for m in plan.micro_batches) * plan.world_size
    return used / (plan.predicted_s * plan.world_size) if plan.predicted_s else 1.0


def step_time(plan: Plan) -> float:
    """Seconds until the last group ends."""
    return max(
        (
            start + group.time_s
            for row, micro_batch in zip(group_starts(plan), plan.micro_batches, strict=True)
            for start, group in zip(row, micro_batch.groups, strict=True)
        ),
        default=0.0,
    )


def layers(groups: Sequence[tuple[float, Group]]) -> tuple[MicroBatch, ...]:
    """Groups with their starts as micro-batches of disjoint ranks that keep every rank's order."""
    depth: dict[int, int] = {}
    rows: list[list[Group]] = []
    for _, group in sorted(groups, key=lambda item: (item[0], item[1].ranks)):
        layer = max(depth.get(r, 0) for r in group.ranks)
        if layer == len(rows):
            rows.append([])
        rows[layer].append(group)
        for r in group.ranks:
            depth[r] = layer + 1
    return tuple(MicroBatch(tuple(row)) for row in rows)
