"""From lengths to a plan: arrange the long documents, pour the short ones, prove a bound.

For small batches the program is then solved as it stands, as a MILP from that plan (`exact`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.errors import ConfigError, PlanError
from dist_attn.planner.bounds import lower_bound
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs
from dist_attn.planner.exact import decide
from dist_attn.planner.fluid import Fluid, Groups, count_long
from dist_attn.planner.placement import place
from dist_attn.planner.plan import Plan, SolverReport
from dist_attn.planner.polish import Polish
from dist_attn.planner.pour import batch_times, pour
from dist_attn.planner.program import Program, build_program
from dist_attn.planner.search import Arrangement, Search


@dataclass(frozen=True)
class Effort:
    """Work limits, so that equal input gives equal plans."""

    #: Ruin-and-recreate steps; a search that comes to rest early takes fewer.
    steps: int = 1000
    #: Exchanges of documents between the groups of the plan that was found.
    exchanges: int = 200
    #: Branch-and-bound nodes of the lower bound; 0: only its root.
    bound_nodes: int = 44


def plan(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
    seed: int = 0,
    effort: Effort = Effort(),
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
        seed: of the search.
        effort: work limits.

    Raises:
        PlanError: a document that no group can hold, or more micro-batches than allowed.
        ConfigError: rules that the cluster cannot meet.
    """
    started = time.monotonic()
    program = build_program(lengths, cluster, cost, planner, strategies)
    deadline = started + planner.time_limit_s
    batches, search = best_batches(program, seed, effort, deadline)
    better = decide(program, batches)
    micro_batches = place(program, better or batches, cluster, cost)
    predicted = sum(m.time_s for m in micro_batches)
    bound = lower_bound(
        program, predicted, [m.time_s for m in micro_batches], effort.bound_nodes, deadline
    )
    return Plan(
        lengths=tuple(int(n) for n in lengths),
        world_size=cluster.world_size,
        micro_batches=micro_batches,
        predicted_s=predicted,
        lower_bound_s=min(bound.value_s, predicted),
        solver=SolverReport(
            method=planner.mode,
            seconds=time.monotonic() - started,
            programs=bound.programs,
            steps=search.steps,
            time_limit_reached=search.late or bound.late,
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
    """Find the best plan whose groups all have one degree; None when none can exist."""
    world = cluster.world_size
    plans = []
    for degree in (d for d in range(1, world + 1) if world % d == 0):
        rules = planner.model_copy(update={"mode": "static", "static_degree": degree})
        try:
            plans.append(plan(lengths, cluster, cost, rules, strategies, seed, Effort(200, 0, 0)))
        except (ConfigError, PlanError):
            continue
    return min(plans, key=lambda p: p.predicted_s, default=None)


def best_batches(
    program: Program, seed: int, effort: Effort, deadline: float
) -> tuple[list[Groups], Search]:
    """The best micro-batches of groups that the search finds.

    Raises:
        PlanError: more micro-batches than allowed.
    """
    fluid = Fluid(program, count_long(program))
    search = Search(fluid, seed, program.max_micro_batches, deadline)
    best: list[Groups] = []
    best_s = math.inf
    found = _search(program, fluid, search, effort.steps)
    if found is not None:
        batches = pour(fluid, found)
        if len(batches) <= program.max_micro_batches:
            best, best_s = batches, sum(batch_times(fluid, batches))
    best = _one_degree(program, seed, deadline, best_s) or best
    best = Polish(program, best).run(effort.exchanges, deadline)
    if not best:
        raise PlanError(
            f"{len(program.lengths)} documents of {int(program.lengths.sum())} tokens do not fit "
            f"into {program.max_micro_batches} micro-batches of {program.num_devices} ranks; raise "
            f"planner.max_micro_batches, use more ranks or a smaller batch"
        )
    return best, search


def _search(program: Program, fluid: Fluid, search: Search, steps: int) -> Arrangement | None:
    """Three short searches, and a longer and cooler one from the best of them."""
    count, aim_s = _start(program, fluid)
    # A step costs more where there are more groups.
    steps = max(min(steps, steps * 500 // max(fluid.num_long, 1)), 5)
    tries = min(10, 2000 // max(fluid.num_long, 1))
    # Degrees of all sizes refine what powers of two, which tile the nodes, have arranged.
    refined = fluid.limit([c for c, d in enumerate(fluid.degree) if d & (d - 1) == 0])
    best: Arrangement | None = None
    for _ in range(3):
        first = search.start(aim_s, count, tries)
        if first is None:
            break
        found = search.run(first, steps // 5)
        if best is None or found.score.total < best.score.total:
            best = found
    fluid.limit(range(len(fluid.degree)))
    if best is None or search.late:
        return best
    return search.run(best, steps if refined else steps * 2 // 5, warmth=0.0003)


def _one_degree(
    program: Program, seed: int, deadline: float, known_s: float
) -> list[Groups] | None:
    """The best first arrangement whose groups all have one degree, if it beats `known_s`.

    So no plan is worse than these.
    """
    best, best_s = None, known_s
    degrees = np.array([c.degree for c in program.classes])
    for degree in sorted(set(degrees.tolist())):
        rows = np.flatnonzero(degrees == degree)
        if len(rows) == len(degrees) or not np.isfinite(program.seconds[rows, 0]).any():
            continue
        only = replace(
            program,
            classes=tuple(program.classes[r] for r in rows),
            seconds=program.seconds[rows],
        )
        fluid = Fluid(only, count_long(only))
        count, aim_s = _start(only, fluid)
        first = Search(fluid, seed, program.max_micro_batches, deadline).start(aim_s, count)
        # Pouring never takes less than the fluid.
        if first is None or first.score.total >= best_s:
            continue
        batches = pour(fluid, first)
        total = sum(batch_times(fluid, batches))
        if len(batches) <= program.max_micro_batches and total < best_s:
            best, best_s = _renumbered(batches, rows.tolist()), total
    return best


def _renumbered(batches: list[Groups], classes: list[int]) -> list[Groups]:
    return [[replace(g, cls=classes[g.cls]) for g in groups] for groups in batches]


def _start(program: Program, fluid: Fluid) -> tuple[int, float]:
    """The least number of micro-batches, and the time that each aims at."""
    tokens = int(program.lengths.sum())
    densest = {
        pool: max(
            c.capacity_tokens // c.degree for c in program.classes if c.kind.pool in (pool, -1)
        )
        for pool in range(len(program.nodes))
    }
    room = sum(
        tokens_per_device * sum(program.nodes[p]) for p, tokens_per_device in densest.items()
    )
    least = max(1, math.ceil(tokens / max(room, 1)))
    work = sum(
        min(s * d for s, d in zip(seconds, fluid.degree, strict=True) if s < math.inf)
        for seconds in fluid.seconds
    )
    fixed = min(fluid.fixed)
    return least, fixed + work / program.num_devices / least
