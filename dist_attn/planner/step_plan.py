"""Plans for `step` synchronisation: ranks run their groups without waiting for each other.

Without a wait at every micro-batch only each rank's own total matters. Long documents get the class
that spends the fewest device seconds and still ends in time; their groups are placed largest first,
each where it can start earliest. Short documents then level what the ranks have left until one
common end, found by bisection. The same placement is also tried for the groups of a `micro_batch`
plan.

The lower bound: every rank works until the end, on at least the least device seconds of every
document, and pays the fixed time of at least as many groups as its tokens need.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs
from dist_attn.planner.fluid import Fluid, OpenGroup, count_long
from dist_attn.planner.placement import describe, reopen
from dist_attn.planner.plan import Plan, SolverReport
from dist_attn.planner.pour import Vessel, distribute
from dist_attn.planner.program import Program, build_program
from dist_attn.planner.schedule import layers, step_time
from dist_attn.planner.solve import Effort, plan


@dataclass(frozen=True)
class _Placed:
    group: OpenGroup
    ranks: tuple[int, ...]
    start_s: float


class _Board:
    """When each rank is free, and the blocks of ranks that a group of some class may take."""

    def __init__(self, program: Program, cluster: Cluster) -> None:
        self.program = program
        self.cluster = cluster
        self.ready = np.zeros(cluster.world_size)
        self._blocks: dict[int, np.ndarray] = {}

    def blocks(self, cls: int) -> np.ndarray:
        """Blocks of a class as rows of ranks: aligned in a node, or whole stretches across."""
        if cls not in self._blocks:
            kind = self.program.classes[cls].kind
            pools = self.cluster.pools if kind.pool < 0 else [self.cluster.pools[kind.pool]]
            nodes = [node for pool in pools for node in pool]
            stretches = nodes if not kind.crosses_nodes else [tuple(r for n in nodes for r in n)]
            rows = [
                stretch[first : first + kind.degree]
                for stretch in stretches
                for first in range(0, len(stretch) - kind.degree + 1, kind.degree)
            ]
            self._blocks[cls] = np.array(rows, dtype=np.int64)
        return self._blocks[cls]

    def place(self, group: OpenGroup, seconds: float) -> _Placed:
        """Give a group the block that is free first."""
        blocks = self.blocks(group.cls)
        free = self.ready[blocks].max(axis=1)
        best = int(np.argmin(free))
        self.ready[blocks[best]] = free[best] + seconds
        return _Placed(group, tuple(blocks[best].tolist()), float(free[best]))


def plan_step(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
    seed: int = 0,
) -> Plan:
    """Plan one batch for ranks that meet only at the optimizer step.

    Raises:
        PlanError: a document that no group can hold.
    """
    started = time.monotonic()
    program = build_program(lengths, cluster, cost, planner, strategies)
    fluid = Fluid(program, count_long(program))
    bound = step_bound(program)
    joint = plan(lengths, cluster, cost, planner, strategies, seed, Effort(bound_nodes=0))
    best, best_s = _spread(joint, program, cluster), math.inf
    best_s = _end(best, fluid)
    for share in (0.9, 0.6, 0.4, 0.25):
        found = _direct(program, fluid, cluster, max(bound, best_s * 0.9) * share, best_s)
        if found is not None and _end(found, fluid) < best_s:
            best, best_s = found, _end(found, fluid)
    groups = [
        (p.start_s, describe(program, p.group, p.ranks, cluster, cost))
        for p in best
        if p.group.documents
    ]
    made = replace(
        joint,
        micro_batches=layers(groups),
        synchronisation="step",
        lower_bound_s=bound,
        solver=SolverReport(method="step", seconds=time.monotonic() - started),
    )
    end = step_time(made)
    return replace(made, predicted_s=end, lower_bound_s=min(bound, end))


def step_bound(program: Program) -> float:
    """Bound every `step` plan from below; see the module."""
    degrees = np.array([c.degree for c in program.classes])[:, None]
    fixed = np.array([c.fixed_s for c in program.classes])
    work = float((program.seconds * degrees).min(axis=0).sum())
    densest = max(c.capacity_tokens / c.degree for c in program.classes)
    groups = max(1.0, float(program.lengths.sum()) / densest)
    longest = float((program.seconds + fixed[:, None]).min(axis=0).max())
    return max(longest, (work + groups * float(fixed.min())) / program.num_devices)


def _end(placed: list[_Placed], fluid: Fluid) -> float:
    return max(p.start_s + fluid.fixed[p.group.cls] + p.group.seconds for p in placed)


def _spread(joint: Plan, program: Program, cluster: Cluster) -> list[_Placed]:
    """The groups of a `micro_batch` plan, each as early as its ranks allow."""
    place_of = {int(d): i for i, d in enumerate(program.order)}
    jobs: list[tuple[float, OpenGroup]] = []
    for micro_batch in joint.micro_batches:
        for group in micro_batch.groups:
            jobs.append((group.time_s, reopen(group, program, cluster, place_of)))
    board = _Board(program, cluster)
    degree = [c.degree for c in program.classes]
    jobs.sort(key=lambda job: (-degree[job[1].cls], -job[0], job[1].documents))
    return [board.place(group, seconds) for seconds, group in jobs]


def _direct(
    program: Program, fluid: Fluid, cluster: Cluster, longest_s: float, known_s: float
) -> list[_Placed] | None:
    """Long documents in their cheapest class that ends within `longest_s`, then the short ones."""
    groups: list[OpenGroup] = []
    for i in range(fluid.num_long):
        seconds = fluid.seconds[i]
        fitting = [c for c, s in enumerate(seconds) if s < math.inf]
        quick = [c for c in fitting if fluid.fixed[c] + seconds[c] <= longest_s]
        if not quick:
            quick = [min(fitting, key=lambda c: fluid.fixed[c] + seconds[c])]
        cls = min(quick, key=lambda c: (seconds[c] * fluid.degree[c], fluid.degree[c]))
        _join(fluid, groups, i, cls, longest_s)
    short = _fill_up(fluid, groups, longest_s)
    board = _Board(program, cluster)
    groups.sort(key=lambda g: (-fluid.degree[g.cls], -g.seconds, g.documents))
    placed = [board.place(g, fluid.fixed[g.cls] + g.seconds) for g in groups]
    low, high = float(board.ready.max()), max(known_s, float(board.ready.max()))
    best = _level(fluid, board, placed, short, high)
    if best is None:
        return None
    for _ in range(9):
        middle = (low + high) / 2
        trial = _level(fluid, board, placed, short, middle)
        if trial is None:
            low = middle
        else:
            best, high = trial, middle
    return best


def _fill_up(fluid: Fluid, groups: list[OpenGroup], longest_s: float) -> list[int]:
    """Short documents into the memory that long ones leave, where that is no dearer than elsewhere.

    Every group that need not be opened saves its fixed time. Returns the documents left over.
    """
    least = min((fluid.rate[f] * fluid.degree[f] for f in fluid.fillers if f >= 0), default=0.0)
    vessels = [
        Vessel(g, longest_s - fluid.fixed[g.cls] - g.seconds, fluid.capacity[g.cls] - g.tokens)
        for g in groups
        if fluid.rate[g.cls] * fluid.degree[g.cls] <= 1.1 * least
    ]
    short = range(fluid.num_long, len(fluid.lengths))
    left = distribute(fluid, [v for v in vessels if v.seconds_left > 0], 1.0, short, len(short))
    return list(short) if left is None else left


def _join(fluid: Fluid, groups: list[OpenGroup], i: int, cls: int, longest_s: float) -> None:
    length, seconds = fluid.lengths[i], fluid.seconds[i][cls]
    work = 1.1 * seconds * fluid.degree[cls]
    for group in groups:
        own = fluid.seconds[i][group.cls]
        if (
            own * fluid.degree[group.cls] <= work
            and group.tokens + length <= fluid.capacity[group.cls]
            and fluid.fixed[group.cls] + group.seconds + own <= longest_s
        ):
            group.documents.append(i)
            group.tokens += length
            group.seconds += own
            return
    groups.append(OpenGroup(cls, seconds, length, [i]))


def _level(
    fluid: Fluid, board: _Board, placed: list[_Placed], short: list[int], end_s: float
) -> list[_Placed] | None:
    """Short documents into groups that fill every rank up to one end, or None."""
    if any(
        p.start_s + fluid.fixed[p.group.cls] + p.group.seconds > end_s * (1 + 1e-9) for p in placed
    ):
        return None
    long = [replace(p, group=replace(p.group, documents=list(p.group.documents))) for p in placed]
    vessels: list[Vessel] = []
    added: list[tuple[OpenGroup, tuple[int, ...], float]] = []
    for filler in fluid.fillers:
        if filler < 0:
            continue
        fixed, capacity = fluid.fixed[filler], fluid.capacity[filler]
        full = fixed + capacity * fluid.rate[filler]
        for block in board.blocks(filler).tolist():
            ready = float(board.ready[block].max())
            needed = math.ceil((end_s - ready) / full * (1 - 1e-9))
            count = max(1, min(needed, len(short)))
            each = (end_s - ready) / count
            if each <= fixed:
                continue
            for k in range(count):
                group = OpenGroup(filler, 0.0, 0)
                vessels.append(Vessel(group, each - fixed, capacity))
                added.append((group, tuple(block), ready + k * each))
    if distribute(fluid, vessels, 1.0, short) is None:
        return None
    return long + [_Placed(g, ranks, start) for g, ranks, start in added if g.documents]
