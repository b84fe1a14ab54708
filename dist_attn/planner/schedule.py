"""When each group of a plan starts, under either synchronisation.

`micro_batch`: all ranks wait for the slowest group of every micro-batch (ZeRO-3 gathers parameters
there). `step`: ranks meet only at the optimizer step; a group starts as soon as its own ranks are
free, in the order in which the plan lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

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
