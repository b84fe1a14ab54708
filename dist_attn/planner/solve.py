"""From lengths to a plan: relax, aim at times, pack, and press the times down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.bounds import Relaxation, relax
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import Costs
from dist_attn.planner.packing import OpenGroup, Packer
from dist_attn.planner.placement import place
from dist_attn.planner.plan import Plan, SolverReport
from dist_attn.planner.program import Program, build_program

#: More than any packing needs, in seconds, yet finite.
_UNLIMITED_S = 1e12


@dataclass
class _Search:
    """The best packing so far and the work spent on it."""

    packer: Packer
    deadline: float
    times: list[float]
    groups: list[OpenGroup]
    packings: int = 0
    late: bool = False

    @property
    def objective(self) -> float:
        return sum(self.times)

    def attempt(self, times: list[float]) -> bool:
        """Pack within these times; keep the packing if it is better than the best."""
        if time.monotonic() > self.deadline:
            self.late = True
            return False
        self.packings += 1
        groups = self.packer.pack(times)
        if groups is None:
            return False
        reached = self.packer.micro_batch_times(groups, len(times))
        if sum(reached) < self.objective * (1 - 1e-9):
            self.times, self.groups = reached, groups
        return True


def plan(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
    seed: int = 0,
) -> Plan:
    """Decide micro-batches, groups, strategies and the place of every document of one batch.

    The work is limited by counts, so that the same input gives the same plan; the clock
    (`planner.time_limit_s`) only cuts a search that would take too long, and the report says so.

    Args:
        lengths: tokens of each document.
        cluster: the ranks, here or elsewhere.
        cost: seconds and bytes of a group.
        planner: rules and limits.
        strategies: what attention may use in groups of two ranks and more.
        seed: orders the search's trials.

    Raises:
        PlanError: a document that no group can hold, or more micro-batches than allowed.
        ConfigError: rules that the cluster cannot meet.
    """
    started = time.monotonic()
    program = build_program(lengths, cluster, cost, planner, strategies)
    relaxation = relax(program)
    packer = Packer(program)
    search = _first_packing(program, packer, relaxation, started + planner.time_limit_s)
    _press(search, np.random.default_rng(seed))
    groups = [g for g in search.groups if g.documents]
    micro_batches = place(program, groups, cluster, cost)
    return Plan(
        lengths=tuple(int(n) for n in lengths),
        world_size=cluster.world_size,
        micro_batches=micro_batches,
        predicted_s=sum(m.time_s for m in micro_batches),
        lower_bound_s=relaxation.lower_bound_s,
        solver=SolverReport(
            method=planner.mode,
            seconds=time.monotonic() - started,
            programs=relaxation.programs,
            packings=search.packings,
            time_limit_reached=search.late,
        ),
        cluster_fingerprint=cluster.fingerprint(),
        cost_fingerprint=cost.fingerprint(),
    )


def static_plan(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
    seed: int = 0,
) -> Plan | None:
    """The best plan whose groups all have one degree, for comparison; None when none can exist."""
    world = cluster.world_size
    plans = []
    for degree in (d for d in range(1, world + 1) if world % d == 0):
        rules = planner.model_copy(update={"mode": "static", "static_degree": degree})
        try:
            plans.append(plan(lengths, cluster, cost, rules, strategies, seed))
        except PlanError:
            continue
    return min(plans, key=lambda p: p.predicted_s, default=None)


def _first_packing(
    program: Program, packer: Packer, relaxation: Relaxation, deadline: float
) -> _Search:
    """The least common factor on the relaxation's times that packs, over a few counts."""
    search = _Search(packer, deadline, [_UNLIMITED_S], [])
    limit = program.max_micro_batches
    times = list(relaxation.times)[:limit]
    starts = [s for s in (times, [*times, times[-1]][:limit], times[:-1]) if s]
    for start in starts:
        _stretch(search, start)
    # Fewer degrees can be better than what longest-first makes of all of them.
    degrees = sorted({c.degree for c in program.classes})
    for degree in degrees if len(degrees) > 1 else []:
        for allowed in ([degree], [d for d in degrees if d >= degree]):
            trial = _Search(Packer(program, allowed), deadline, search.times, search.groups)
            for start in starts:
                _stretch(trial, start)
            search.packings += trial.packings
            search.late |= trial.late
            if trial.groups is not search.groups:
                search.packer, search.times, search.groups = trial.packer, trial.times, trial.groups
    count = len(times)
    while not search.groups and count <= limit:
        groups = packer.pack([_UNLIMITED_S] * count)
        if groups is not None:
            search.times, search.groups = packer.micro_batch_times(groups, count), groups
        count = count + 1 if count < 8 else max(count + 1, min(count * 5 // 4, limit))
    if not search.groups:
        raise PlanError(
            f"{len(program.lengths)} documents of {int(program.lengths.sum())} tokens do not fit into "
            f"{limit} micro-batches of {program.num_devices} ranks; raise planner.max_micro_batches, "
            f"use more ranks or a smaller batch"
        )
    return search


def _stretch(search: _Search, times: list[float], steps: int = 8) -> None:
    low, high = 0.98, 2.0
    if not search.attempt([t * high for t in times]):
        return
    for _ in range(steps):
        middle = (low + high) / 2
        if search.attempt([t * middle for t in times]):
            high = middle
        else:
            low = middle


def _press(search: _Search, generator: np.random.Generator, rounds: int = 40) -> None:
    """Shorten one micro-batch at a time, and trade time between two."""
    for step in (0.1, 0.05, 0.02, 0.01):
        for _ in range(rounds // 4):
            times = [t for t in search.times if t > 0]
            m = int(generator.integers(len(times)))
            shorter = times[m] * step
            trial = list(times)
            trial[m] -= shorter
            if generator.random() < 0.5 and len(times) > 1:
                other = (m + 1 + int(generator.integers(len(times) - 1))) % len(times)
                trial[other] += shorter * 0.5
            search.attempt(trial)
