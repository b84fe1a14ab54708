"""Plans with `free` placement: every document on its own ranks, in uneven shares where it must.

A rank may hold the end of one long document, the head of another and many short ones whole. Short
documents cost no communication, and what counts is each rank's sum: its tokens, its linear work and
its attention. Which documents make a micro-batch is decided by the search for groups, on a program
in which short documents cost no communication anywhere; each micro-batch is then settled on its
ranks (`settle`) in the least time that a bisection finds, anywhere or group by group. The same is
done with the micro-batches of a plan in groups, so that no such plan is better.

The lower bound holds for any placement on any ranks: all work at its cheapest spread over all ranks
without loss, as many micro-batches as memory asks for, and the longest document in one of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, GroupKind
from dist_attn.planner.fluid import Groups
from dist_attn.planner.placement import ranks_of, reopen
from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.planner.program import Program, build_program
from dist_attn.planner.settle import Placed, Settler
from dist_attn.planner.solve import Effort, best_batches, plan
from dist_attn.planner.uneven import Team, rank_seconds

#: A document is short if it takes at most this share of a rank's room and of its work.
_SHORT = 0.35
#: Settling stops when the time is known to this share.
_PRECISION = 0.002
#: How often a time is raised by a tenth until everything finds a place.
_RAISES = 8


def plan_free(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
    seed: int = 0,
    effort: Effort | None = None,
) -> Plan:
    """Plan one batch with `free` placement; see the module, and `solve.plan` for the arguments.

    Raises:
        PlanError: a document that no group can hold, or more micro-batches than allowed.
        ConfigError: rules that the cluster cannot meet.
    """
    started = time.monotonic()
    program = build_program(lengths, cluster, cost, planner, strategies, whole_documents=False)
    settler = Settler(program, cluster, cost)
    deadline = started + planner.time_limit_s
    effort = replace(effort or Effort(), bound_nodes=0)
    eased, search = best_batches(_eased(program, cost), seed, effort, deadline)
    left = {"time_limit_s": max(deadline - time.monotonic(), 0.01)}
    rules = planner.model_copy(update=left)
    in_groups = plan(lengths, cluster, cost, rules, strategies, seed, effort)
    late = search.late or in_groups.solver.time_limit_reached
    best, best_s = [], math.inf
    # Those in groups come last: without any time left they are what stands.
    for batches in (eased, _batches_of(in_groups, program, cluster)):
        placed = [_settled(program, settler, groups, cluster, deadline) for groups in batches]
        seconds = sum(settler.end(p) for p in placed)
        if seconds < best_s * (1 - 1e-9):
            best, best_s = placed, seconds
        late = late or time.monotonic() > deadline
    micro_batches = [_describe(program, settler, p, cluster, cost) for p in best]
    micro_batches.sort(key=lambda m: (-m.time_s, m.groups[0].documents))
    predicted = sum(m.time_s for m in micro_batches)
    return Plan(
        lengths=tuple(int(n) for n in lengths),
        world_size=cluster.world_size,
        micro_batches=tuple(micro_batches),
        predicted_s=predicted,
        lower_bound_s=min(free_bound(program, cluster, cost), predicted),
        solver=SolverReport(
            method=f"{planner.mode}, free placement",
            seconds=time.monotonic() - started,
            steps=search.steps + in_groups.solver.steps,
            time_limit_reached=late,
        ),
        cluster_fingerprint=cluster.fingerprint(),
        cost_fingerprint=cost.fingerprint(),
        placement="free",
    )


def free_bound(program: Program, cluster: Cluster, cost: Costs) -> float:
    """Bound every plan with `free` placement from below; see the module."""
    count = _least_batches(program)
    fixed = min(c.fixed_s for c in program.classes)
    if len(cluster.devices) == 1:
        degrees = np.array([c.degree for c in program.classes])[:, None]
        work = (program.seconds * degrees).min(axis=0)
        longest = float(program.seconds.min(axis=0).max())
        return count * fixed + max(float(work.sum()) / program.num_devices, longest)
    # Ranks of different speed may share by speed. In seconds of the quickest device, and without
    # communication, a rank of another kind gets done what its device does at best.
    kinds = [GroupKind(1, "local", pool) for pool in range(len(cluster.devices))]
    by_pool = np.stack([cost.compute_s(kind, program.lengths) for kind in kinds])
    work = by_pool.min(axis=0)
    some = work > 0
    if not some.any():
        return count * fixed
    slowness = (by_pool[:, some] / work[some]).min(axis=1)
    speed = sum(sum(nodes) / s for nodes, s in zip(program.nodes, slowness, strict=True))
    return count * fixed + float(work.sum()) / speed


def _least_batches(program: Program) -> int:
    room = sum(
        sum(program.nodes[pool])
        * max(c.capacity_tokens // c.degree for c in program.classes if c.kind.pool in (pool, -1))
        for pool in range(len(program.nodes))
    )
    return max(1, math.ceil(int(program.lengths.sum()) / max(room, 1)))


def _eased(program: Program, cost: Costs) -> Program:
    """The program in which short documents cost no communication."""
    seconds = program.seconds.copy()
    degrees = np.array([c.degree for c in program.classes])[:, None]
    alone = (seconds * degrees).min(axis=0)
    most = _SHORT * float(alone.sum()) / program.num_devices / _least_batches(program)
    for row, c in enumerate(program.classes):
        short = (program.lengths <= _SHORT * c.capacity_tokens / c.degree) & (alone <= most)
        seconds[row, short] = cost.compute_s(c.kind, program.lengths[short])
    return replace(program, seconds=seconds)


def _batches_of(found: Plan, program: Program, cluster: Cluster) -> list[Groups]:
    place_of = {int(d): i for i, d in enumerate(program.order)}
    return [
        [reopen(group, program, cluster, place_of) for group in m.groups]
        for m in found.micro_batches
    ]


def _settled(
    program: Program, settler: Settler, groups: Groups, cluster: Cluster, deadline: float
) -> list[Placed]:
    """The best placement of a micro-batch: anywhere, group by group, or in even shares.

    After the deadline there are even shares only.
    """
    documents = sorted(i for g in groups for i in g.documents)
    longest = max(program.classes[g.cls].fixed_s + g.seconds for g in groups)
    tries = [_spread_groups(program, settler, groups, cluster)]
    if time.monotonic() < deadline:
        tries.append(_settle_groups(program, settler, groups, longest, cluster))
    anywhere = _settle(settler, documents, longest, deadline)
    if anywhere is not None:
        tries.append(anywhere)
    if time.monotonic() < deadline:
        tries += [settler.level(t) for t in tries[1:]]
    return min(tries, key=settler.end)


def _settle(
    settler: Settler, documents: list[int], longest_s: float, deadline: float
) -> list[Placed] | None:
    """The placement in the least time found by bisection; None where none is found in time.

    Where degrees are limited, crumbs of memory may be no block's however long it has.
    """
    low = settler.least_time(documents)
    high = max(longest_s, low)
    best = None
    for _ in range(_RAISES):
        if time.monotonic() > deadline:
            return None
        best = settler.settle(documents, high)
        if best is not None:
            break
        low, high = high, high * 1.1
    while best is not None and high - low > _PRECISION * high and time.monotonic() < deadline:
        middle = (low + high) / 2
        found = settler.settle(documents, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _settle_groups(
    program: Program, settler: Settler, groups: Groups, time_s: float, cluster: Cluster
) -> list[Placed]:
    """Every group's documents on the group's own ranks."""
    placed = []
    for group, ranks in ranks_of(program, groups, cluster):
        found = None
        for factor in (1.0, 1.01, 1.03, 1.06) if len(ranks) > 1 else ():
            found = settler.settle(group.documents, time_s * factor, ranks)
            if found is not None:
                break
        placed += found or settler.spread(group.documents, group.cls, ranks)
    return placed


def _spread_groups(
    program: Program, settler: Settler, groups: Groups, cluster: Cluster
) -> list[Placed]:
    """Every document evenly on its group's ranks."""
    return [
        p
        for group, ranks in ranks_of(program, groups, cluster)
        for p in settler.spread(group.documents, group.cls, ranks)
    ]


def _describe(
    program: Program, settler: Settler, placed: list[Placed], cluster: Cluster, cost: Costs
) -> MicroBatch:
    """Documents of the same ranks and strategy as one group, large groups first."""
    together: dict[tuple[tuple[int, ...], str], list[Placed]] = {}
    for p in placed:
        strategy = "local" if p.cls < 0 else program.classes[p.cls].kind.strategy
        together.setdefault((p.ranks, strategy), []).append(p)
    tokens_of = np.zeros(cluster.world_size, dtype=np.int64)
    for p in placed:
        tokens_of[list(p.ranks)] += np.array(p.shares)
    groups = []
    for (ranks, strategy), members in together.items():
        members.sort(key=lambda p: int(program.order[p.document]))
        array = program.lengths[[p.document for p in members]]
        shares = np.array([p.shares for p in members])
        team = Team.of(ranks, strategy, cluster)
        compute, communication = rank_seconds(cost, team, array, shares)
        latency = max(cost.fixed_s(team.kind) - settler.fixed_s, 0.0)
        slowest = int(np.argmax(compute + communication))
        groups.append(
            Group(
                ranks=ranks,
                strategy=strategy,
                documents=tuple(int(program.order[p.document]) for p in members),
                tokens=int(array.sum()),
                overhead_s=latency,
                compute_s=float(compute[slowest]),
                communication_s=float(communication[slowest]),
                memory_bytes=cost.memory_bytes(int(tokens_of[list(ranks)].max())),
                shares=tuple(p.shares for p in members),
                rank_s=tuple((latency + compute + communication).tolist()),
            )
        )
    groups.sort(key=lambda g: (-g.degree, g.ranks, g.strategy))
    return MicroBatch(tuple(groups), overhead_s=settler.fixed_s)
