"""An independent check of a plan: it shares no code with the solver and recomputes everything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.planner.check_free import check_free
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, GroupKind
from dist_attn.planner.plan import Group, Plan


def check_plan(
    plan: Plan, lengths: Sequence[int], cluster: Cluster, cost: Costs, *, tolerance: float = 1e-6
) -> None:
    """Raise PlanError, naming everything that is wrong, unless the plan is sound.

    Checked: it is for these lengths and this cluster; every document lies in exactly one group;
    groups of a micro-batch have disjoint ranks, but with `free` placement; tokens and shares add
    up; no rank holds more than it can; the strategy is allowed; times follow from the cost model;
    the predicted time is the sum over micro-batches of the slowest group (with `free` placement of
    the slowest rank), or under `step` synchronisation the end of the last rank; the lower bound is
    not above it.
    """
    wrong = _check_frame(plan, lengths, cluster)
    if wrong:
        raise PlanError("; ".join(wrong))
    total = 0.0
    free_at = [0.0] * plan.world_size
    for m, micro_batch in enumerate(plan.micro_batches):
        if plan.placement == "free":
            total += check_free(f"micro-batch {m}", micro_batch, plan, cluster, cost, wrong)
            continue
        slowest = 0.0
        for g, group in enumerate(micro_batch.groups):
            name = f"micro-batch {m} group {g}"
            seconds = _check_group(name, group, plan, cluster, cost, wrong)
            if not math.isclose(seconds, group.time_s, rel_tol=tolerance, abs_tol=1e-12):
                wrong.append(f"{name}: predicted {group.time_s} s, recomputed {seconds} s")
            slowest = max(slowest, seconds)
            end = max(free_at[r] for r in group.ranks) + seconds
            for r in group.ranks:
                free_at[r] = end
        total += slowest
    if plan.synchronisation == "step":
        total = max(free_at)
    if not math.isclose(total, plan.predicted_s, rel_tol=tolerance, abs_tol=1e-12):
        wrong.append(f"the plan predicts {plan.predicted_s} s, recomputed {total} s")
    if plan.lower_bound_s > plan.predicted_s * (1 + tolerance):
        wrong.append(f"the lower bound {plan.lower_bound_s} s is above {plan.predicted_s} s")
    if wrong:
        raise PlanError("the plan is not sound: " + "; ".join(wrong[:20]))


def _check_frame(plan: Plan, lengths: Sequence[int], cluster: Cluster) -> list[str]:
    """Lengths, ranks, and every document once."""
    if list(plan.lengths) != [int(n) for n in lengths]:
        return ["the plan is for other lengths"]
    if plan.world_size != cluster.world_size:
        return [f"the plan is for {plan.world_size} ranks, not {cluster.world_size}"]
    wrong = []
    counts = [0] * len(plan.lengths)
    for m, micro_batch in enumerate(plan.micro_batches):
        ranks = [r for g in micro_batch.groups for r in g.ranks]
        if plan.placement == "groups" and len(set(ranks)) != len(ranks):
            wrong.append(f"micro-batch {m}: a rank is used twice")
        if not all(0 <= r < cluster.world_size for r in ranks):
            wrong.append(f"micro-batch {m}: a rank outside the cluster")
        documents = [d for g in micro_batch.groups for d in g.documents]
        if not all(0 <= d < len(counts) for d in documents):
            return [*wrong, f"micro-batch {m}: a document that is not in the batch"]
        for d in documents:
            counts[d] += 1
    wrong += [f"document {d} lies in {n} groups" for d, n in enumerate(counts) if n != 1]
    return wrong


def _check_group(
    name: str, group: Group, plan: Plan, cluster: Cluster, cost: Costs, wrong: list[str]
) -> float:
    kinds = {cluster.device_of[r] for r in group.ranks}
    kind = GroupKind(
        degree=group.degree,
        strategy=group.strategy,
        pool=kinds.pop() if len(kinds) == 1 else -1,
        crosses_nodes=len({cluster.node_of[r] for r in group.ranks}) > 1,
    )
    if (group.strategy == "local") != (group.degree == 1) or not cost.allows(kind):
        wrong.append(f"{name}: strategy '{group.strategy}' on {group.degree} ranks")
    lengths = np.array([plan.lengths[d] for d in group.documents], dtype=np.int64)
    tokens = int(lengths.sum())
    if tokens != group.tokens:
        wrong.append(f"{name}: {group.tokens} tokens stated, {tokens} held")
    if tokens > group.degree * cost.capacity_tokens(kind):
        wrong.append(
            f"{name}: {tokens} tokens on {group.degree} ranks of {cost.capacity_tokens(kind)}"
        )
    return (
        cost.fixed_s(kind)
        + float(cost.compute_s(kind, lengths).sum())
        + float(cost.communication_s(kind, lengths).sum())
    )
