"""The part of the check that concerns `free` placement; shares no code with the solver either."""

from __future__ import annotations

import math

import numpy as np

from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, FloatArray, GroupKind
from dist_attn.planner.plan import Group, MicroBatch, Plan

_TOLERANCE = 1e-6


def check_free(
    name: str, micro_batch: MicroBatch, plan: Plan, cluster: Cluster, cost: Costs, wrong: list[str]
) -> float:
    """Seconds of a micro-batch, recomputed rank by rank; complaints go to `wrong`."""
    busy = np.zeros(cluster.world_size)
    tokens = np.zeros(cluster.world_size, dtype=np.int64)
    alone = [GroupKind(1, "local", pool) for pool in cluster.device_of]
    fixed = max(cost.fixed_s(kind) for kind in alone)
    if not math.isclose(fixed, micro_batch.overhead_s, rel_tol=_TOLERANCE, abs_tol=1e-12):
        wrong.append(f"{name}: overhead {micro_batch.overhead_s} s, recomputed {fixed} s")
    for g, group in enumerate(micro_batch.groups):
        seconds = _seconds(group, plan, cluster, cost, fixed)
        if (group.strategy == "local") != (group.degree == 1) or len(seconds) == 0:
            wrong.append(f"{name} group {g}: strategy '{group.strategy}' on {group.degree} ranks")
            continue
        if not np.allclose(seconds, group.rank_s, rtol=_TOLERANCE, atol=1e-12):
            wrong.append(f"{name} group {g}: ranks take {group.rank_s} s, recomputed {seconds} s")
        if not math.isclose(group.time_s, float(seconds.max()), rel_tol=_TOLERANCE, abs_tol=1e-12):
            wrong.append(f"{name} group {g}: {group.time_s} s, its slowest rank {seconds.max()} s")
        shares = np.array(group.shares, dtype=np.int64).reshape(-1, group.degree)
        if shares.tolist() and list(shares.sum(axis=1)) != [
            plan.lengths[d] for d in group.documents
        ]:
            wrong.append(f"{name} group {g}: shares do not add up to the documents")
        if group.tokens != int(shares.sum()):
            wrong.append(f"{name} group {g}: {group.tokens} tokens stated, {shares.sum()} held")
        busy[list(group.ranks)] += seconds
        tokens[list(group.ranks)] += shares.sum(axis=0)
    for rank, held in enumerate(tokens.tolist()):
        room = cost.capacity_tokens(alone[rank])
        if held > room:
            wrong.append(f"{name}: rank {rank} holds {held} tokens, more than {room}")
    return fixed + float(busy.max())


def _seconds(group: Group, plan: Plan, cluster: Cluster, cost: Costs, fixed: float) -> FloatArray:
    """Seconds of each rank of a group; empty where the group is not allowed."""
    crosses = len({cluster.node_of[r] for r in group.ranks}) > 1
    result = np.zeros(group.degree)
    for k, rank in enumerate(group.ranks):
        kind = GroupKind(group.degree, group.strategy, cluster.device_of[rank], crosses)
        if not cost.allows(kind):
            return np.zeros(0)
        for document, shares in zip(group.documents, group.shares, strict=True):
            length = plan.lengths[document]
            part = shares[k] / length if length else 0.0
            one = np.array([length])
            linear = float(cost.linear_s(kind, one)[0])
            attention = float(cost.compute_s(kind, one)[0]) - linear
            linear *= group.degree * part
            if group.strategy != "ulysses":
                attention *= group.degree * part
            sent = float(cost.exchange_s(kind, one)[0]) * max(1.0, group.degree * part)
            if part == 0 and group.strategy == "gather":
                sent = 0.0
            result[k] += linear + attention + max(sent - cost.overlap(kind) * attention, 0.0)
    pools = {cluster.device_of[r] for r in group.ranks}
    whole = GroupKind(group.degree, group.strategy, pools.pop() if len(pools) == 1 else -1, crosses)
    return result + max(cost.fixed_s(whole) - fixed, 0.0)
