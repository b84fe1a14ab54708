"""What plans are compared with: a greedy dynamic context parallelism with powers of two.

Source: written after the description of Megatron-LM's dynamic ("hybrid") context parallelism: every
sequence gets the smallest power of two of ranks that holds it, and a scheduler fills one
micro-batch after another to the brim, longest sequence first, giving each to the least loaded
group of its degree. Nothing is traded between degrees, and no time is aimed at. `static_plan` in
`solve` is the other baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs
from dist_attn.planner.fluid import Fluid, Groups, OpenGroup
from dist_attn.planner.placement import place
from dist_attn.planner.plan import Plan, SolverReport
from dist_attn.planner.program import Program, build_program


def dynamic_plan(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str] = ("ring", "ulysses"),
) -> Plan:
    """Plan greedily: the smallest degree for each document, micro-batches filled in order.

    Raises:
        PlanError: a document that no group can hold.
    """
    rules = planner.model_copy(update={"degrees": "powers_of_two"})
    program = build_program(lengths, cluster, cost, rules, strategies)
    batches = _fill(program, Fluid(program, len(program.lengths)))
    micro_batches = place(program, batches, cluster, cost)
    return Plan(
        lengths=tuple(int(n) for n in lengths),
        world_size=cluster.world_size,
        micro_batches=micro_batches,
        predicted_s=sum(m.time_s for m in micro_batches),
        lower_bound_s=0.0,
        solver=SolverReport(method="greedy dynamic"),
        cluster_fingerprint=cluster.fingerprint(),
        cost_fingerprint=cost.fingerprint(),
    )


def _fill(program: Program, fluid: Fluid) -> list[Groups]:
    batches: list[Groups] = []
    waiting = list(range(len(program.lengths)))
    degrees = np.array(fluid.degree)
    chosen = []
    for i in waiting:
        fitting = np.flatnonzero(np.isfinite(program.seconds[:, i])).tolist()
        chosen.append(min((degrees[c], program.seconds[c, i], c) for c in fitting)[2])
    while waiting:
        batch: Groups = []
        left = []
        for i in waiting:
            if not _join_or_open(fluid, batch, i, chosen[i]):
                left.append(i)
        if not batch:
            raise PlanError("no group of the batch fits into the cluster")
        batches.append(batch)
        waiting = left
    return batches


def _join_or_open(fluid: Fluid, batch: Groups, i: int, cls: int) -> bool:
    """Open a group while devices are free, then join the least loaded one of the same class."""
    length, seconds = fluid.lengths[i], fluid.seconds[i][cls]
    opened = OpenGroup(cls, seconds, length, [i])
    if fluid.free_devices([*batch, opened]) is not None:
        batch.append(opened)
        return True
    fitting = [g for g in batch if g.cls == cls and g.tokens + length <= fluid.capacity[cls]]
    if not fitting:
        return False
    group = min(fitting, key=lambda g: g.seconds)
    group.seconds += seconds
    group.tokens += length
    group.documents.append(i)
    return True
