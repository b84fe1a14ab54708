"""From groups as counted to groups of ranks."""

from __future__ import annotations

import numpy as np

from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, GroupKind
from dist_attn.planner.fluid import Groups, OpenGroup
from dist_attn.planner.plan import Group, MicroBatch
from dist_attn.planner.program import Program


def place(
    program: Program, batches: list[Groups], cluster: Cluster, cost: Costs
) -> tuple[MicroBatch, ...]:
    """Give every group its ranks, and each group the strategy that is best for all its documents.

    Large groups come first and take ranks in order, so that the same sets of ranks return from
    micro-batch to micro-batch and step to step. The slowest micro-batch comes first.
    """
    found = [_place_one(program, groups, cluster, cost) for groups in batches if groups]
    return tuple(sorted(found, key=lambda m: (-m.time_s, m.groups[0].documents)))


def _place_one(program: Program, members: Groups, cluster: Cluster, cost: Costs) -> MicroBatch:
    return MicroBatch(
        tuple(
            describe(program, group, ranks, cluster, cost)
            for group, ranks in ranks_of(program, members, cluster)
        )
    )


def ranks_of(
    program: Program, members: Groups, cluster: Cluster
) -> list[tuple[OpenGroup, tuple[int, ...]]]:
    """Give each group of a micro-batch its ranks, large groups first."""
    classes = program.classes

    def size(group: OpenGroup) -> tuple[bool, bool, int, int]:
        kind = classes[group.cls].kind
        # Groups of any device come last; within a pool those that need whole nodes come first.
        return (kind.pool < 0, not kind.crosses_nodes, -kind.degree, group.documents[0])

    free = [[list(node) for node in pool] for pool in cluster.pools]
    return [
        (group, tuple(sorted(_take(free, classes[group.cls].kind))))
        for group in sorted(members, key=size)
    ]


def _take(free: list[list[list[int]]], kind: GroupKind) -> list[int]:
    nodes = free[kind.pool] if kind.pool >= 0 else [node for pool in free for node in pool]
    if not kind.crosses_nodes:
        fitting = [n for n in nodes if len(n) >= kind.degree]
        if fitting:
            node = min(fitting, key=len)
            taken = node[: kind.degree]
            del node[: kind.degree]
            return taken
    taken = []
    for node in sorted(nodes, key=len, reverse=True):
        part = node[: kind.degree - len(taken)]
        del node[: len(part)]
        taken += part
    assert len(taken) == kind.degree, "packing counted the devices"
    return taken


def describe(
    program: Program, group: OpenGroup, ranks: tuple[int, ...], cluster: Cluster, cost: Costs
) -> Group:
    """The group as the plan tells it, with what it costs where it really lies."""
    kind = program.classes[group.cls].kind
    crosses = cluster.spans_nodes(ranks)
    kinds = {cluster.device_of[r] for r in ranks}
    pool = kinds.pop() if len(kinds) == 1 else -1
    lengths = program.lengths[np.array(group.documents)]
    strategies = {c.kind.strategy for c in program.classes if c.degree == kind.degree}
    best: Group | None = None
    for strategy in sorted(strategies):
        actual = GroupKind(kind.degree, strategy, pool, crosses)
        if not cost.allows(actual) or lengths.sum() > kind.degree * cost.capacity_tokens(actual):
            continue
        found = Group(
            ranks=ranks,
            strategy=strategy,
            documents=tuple(sorted(int(program.order[i]) for i in group.documents)),
            tokens=int(lengths.sum()),
            overhead_s=cost.fixed_s(actual),
            compute_s=float(cost.compute_s(actual, lengths).sum()),
            communication_s=float(cost.communication_s(actual, lengths).sum()),
            memory_bytes=cost.memory_bytes(-(-int(lengths.sum()) // kind.degree)),
        )
        if best is None or found.time_s < best.time_s:
            best = found
    assert best is not None, "the packing's own strategy is allowed"
    return best


def reopen(group: Group, program: Program, cluster: Cluster, place_of: dict[int, int]) -> OpenGroup:
    """The group of a plan as the solver counts it, from each document's place in the program."""
    documents = sorted(place_of[d] for d in group.documents)
    kinds = {cluster.device_of[r] for r in group.ranks}
    pool = kinds.pop() if len(kinds) == 1 else -1
    crosses = cluster.spans_nodes(group.ranks)
    fitting = [
        c
        for c, k in enumerate(program.classes)
        if k.degree == group.degree
        and k.kind.strategy == group.strategy
        and k.kind.pool in (pool, -1)
        and (k.kind.crosses_nodes == crosses or k.kind.pool < 0)
    ]
    cls = fitting[0]
    seconds = float(program.seconds[cls, documents].sum())
    return OpenGroup(cls, seconds, group.tokens, documents)
