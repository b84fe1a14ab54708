"""The program that a plan solves.

Given documents i with lengths n_i, pools p of D_p equal devices, and group classes c: a degree
d_c, a strategy, a pool, inside a node or across, a fixed time f_c, a token capacity Q_c, and
seconds s_ci that document i adds to such a group.

Variables, for micro-batches m = 1 .. M with M itself free up to a limit:
    T_m >= 0          seconds of micro-batch m
    y_mg in {0, 1}    group slot g of micro-batch m is open; c(g) is its class
    x_img in {0, 1}   document i lies in group g of micro-batch m

Minimise   sum over m of T_m
subject to
    sum over m, g of x_img = 1                                      every document once
    f_c(g) y_mg + sum over i of s_c(g)i x_img <= T_m                the slowest group sets the time
    sum over i of n_i x_img <= Q_c(g) y_mg                          memory
    sum over g in pool p of d_c(g) y_mg <= D_p                      devices, for every pool
    groups that do not cross nodes fit into the nodes               placement

`Program` is this data, documents longest first. `bounds` relaxes it to a linear program over length
classes and time classes, whose optimum is a lower bound; `packing` and `solve` find plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_attn.config import PlannerConfig
from dist_attn.errors import ConfigError, PlanError
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, FloatArray, GroupKind, IntArray


@dataclass(frozen=True)
class GroupClass:
    """Groups that cost the same: `fixed_s` and `capacity_tokens` are the whole group's."""

    kind: GroupKind
    fixed_s: float
    capacity_tokens: int

    @property
    def degree(self) -> int:
        """Devices of such a group."""
        return self.kind.degree


@dataclass(frozen=True)
class Program:
    """The data of the program; see the module."""

    #: Longest first, and where each stands in the batch.
    lengths: IntArray
    order: IntArray
    classes: tuple[GroupClass, ...]
    #: [classes, documents]; infinite where the document does not fit.
    seconds: FloatArray
    #: Per pool, the devices of each of its nodes.
    nodes: tuple[tuple[int, ...], ...]
    max_micro_batches: int
    #: Whether groups may fail to find a node although there are devices enough.
    tight_nodes: bool = False

    @property
    def num_devices(self) -> int:
        """Devices of all pools."""
        return sum(sum(n) for n in self.nodes)


def build_program(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str],
    whole_documents: bool = True,
) -> Program:
    """Gather the classes that the configuration allows and what every document costs in each.

    Args:
        lengths: tokens of each document.
        cluster: the ranks.
        cost: seconds and bytes of a group.
        planner: rules and limits.
        strategies: what attention may use in groups of two ranks and more.
        whole_documents: a group holds documents whole, so that of its memory it can only use a
            multiple of what divides all lengths (batches are often padded to such a number).

    Raises:
        PlanError: no documents, a length that is none, or a document that no group can hold.
        ConfigError: degrees that the cluster does not have.
    """
    array = _checked(lengths)
    order = np.lexsort((np.arange(len(array)), -array))
    ordered = array[order]
    degrees = _degrees(cluster, planner)
    classes = _classes(cluster, cost, degrees, strategies)
    if not classes:
        raise ConfigError(
            f"no strategy of {list(strategies)} can run groups of {degrees} ranks; allow 'ring' in "
            f"attention.strategies or smaller degrees"
        )
    seconds = np.full((len(classes), len(ordered)), np.inf)
    for row, c in enumerate(classes):
        fits = ordered <= c.capacity_tokens
        fitting = ordered[fits]
        seconds[row, fits] = cost.compute_s(c.kind, fitting) + cost.communication_s(c.kind, fitting)
    if not np.isfinite(seconds.min(axis=0)).all():
        raise PlanError(_too_long(ordered, order, classes, planner) + _hint(strategies))
    if whole_documents:
        unit = max(int(np.gcd.reduce(ordered)), 1)
        usable = [row for row, c in enumerate(classes) if c.capacity_tokens >= unit]
        classes = [
            replace(classes[row], capacity_tokens=classes[row].capacity_tokens // unit * unit)
            for row in usable
        ]
        seconds = seconds[usable]
    nodes = tuple(tuple(len(node) for node in pool) for pool in cluster.pools)
    return Program(
        lengths=ordered,
        order=order,
        classes=tuple(classes),
        seconds=seconds,
        nodes=nodes,
        max_micro_batches=planner.max_micro_batches,
        tight_nodes=not all(tiled for p, _, _, tiled in _pools(cluster, degrees) if p >= 0),
    )


def _checked(lengths: Sequence[int]) -> IntArray:
    if len(lengths) == 0:
        raise PlanError("a batch without documents cannot be planned; give at least one length")
    array = np.asarray(lengths)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise PlanError(f"lengths must be integers in one row, got {array.dtype} of {array.shape}")
    if array.min() < 0:
        bad = int(np.argmin(array))
        raise PlanError(f"document {bad} has length {array[bad]}; lengths are 0 or more")
    return array.astype(np.int64)


def _degrees(cluster: Cluster, planner: PlannerConfig) -> list[int]:
    world = cluster.world_size
    if planner.mode == "static":
        degree = planner.static_degree
        assert degree is not None
        if world % degree:
            raise ConfigError(
                f"planner.static_degree must divide the {world} ranks, got {degree}; allowed are "
                f"{', '.join(str(d) for d in range(1, world + 1) if world % d == 0)}"
            )
        return [degree]
    top = min(world, planner.max_degree or world)
    if planner.degrees == "powers_of_two":
        return [1 << k for k in range(top.bit_length())]
    node = max(len(n) for pool in cluster.pools for n in pool)
    # Every degree of a node and a little more; beyond, whole nodes in steps of about an eighth.
    degrees = list(range(1, min(top, max(node, 16)) + 1))
    while degrees[-1] < top:
        step = max(degrees[-1] // 8 // node, 1) * node
        degrees.append(min((degrees[-1] + step) // node * node, top))
    return degrees


def _classes(
    cluster: Cluster, cost: Costs, degrees: list[int], strategies: Sequence[str]
) -> list[GroupClass]:
    classes = []
    for pool, size, node, aligned in _pools(cluster, degrees):
        for degree in degrees:
            if degree > size:
                continue
            crossings = (
                [True] if degree > node else [False] if degree == 1 or aligned else [False, True]
            )
            for crosses in crossings:
                for strategy in ["local"] if degree == 1 else sorted(set(strategies)):
                    kind = GroupKind(degree, strategy, pool, crosses)
                    if cost.allows(kind):
                        capacity = degree * cost.capacity_tokens(kind)
                        classes.append(GroupClass(kind, cost.fixed_s(kind), capacity))
    return classes


def _pools(cluster: Cluster, degrees: list[int]) -> list[tuple[int, int, int, bool]]:
    """Pool, devices, devices of the largest node, and whether all degrees tile all nodes.

    Pool -1 stands for all devices together and counts as crossing nodes.
    """
    found = []
    for index, pool in enumerate(cluster.pools):
        sizes = {len(node) for node in pool}
        node = max(sizes)
        powers = all(d & (d - 1) == 0 for d in degrees if d <= node)
        aligned = len(pool) == 1 or (powers and all(n & (n - 1) == 0 for n in sizes))
        found.append((index, sum(len(n) for n in pool), node, aligned))
    if len(found) > 1:
        found.append((-1, cluster.world_size, 1, False))
    return found


def _hint(strategies: Sequence[str]) -> str:
    if not all("+" in s for s in strategies):
        return ""
    return (
        f"; or add a strategy in one level to attention.strategies: {', '.join(strategies)} take "
        f"groups of several whole nodes only, or of several times attention.inner_degree ranks"
    )


def _too_long(
    lengths: IntArray, order: IntArray, classes: list[GroupClass], planner: PlannerConfig
) -> str:
    best = max(classes, key=lambda c: c.capacity_tokens)
    per_rank = best.capacity_tokens // best.degree
    over = [(int(order[i]), int(n)) for i, n in enumerate(lengths) if n > best.capacity_tokens]
    index, length = over[0]
    more = f" (and {len(over) - 1} more documents)" if len(over) > 1 else ""
    remedies = [f"groups of {-(-length // per_rank)} ranks"]
    if planner.max_tokens_per_device is not None:
        remedies.append(
            f"planner.max_tokens_per_device of {-(-length // best.degree)} where memory allows"
        )
    remedies.append(f"documents of at most {best.capacity_tokens} tokens (data.overlong: split)")
    return (
        f"document {index} with {length} tokens{more} is longer than any group can hold: "
        f"{best.degree} ranks of {per_rank} tokens hold {best.capacity_tokens}; it needs "
        f"{length - best.capacity_tokens} tokens more. Remedies: {'; or '.join(remedies)}"
    )
