"""Ranks as the planner counts them: neighbours that hold one model between them are one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from dist_attn.errors import ConfigError
from dist_attn.groups import two_level_sets


@dataclass(frozen=True)
class Topology:
    """Rank `p * t + s` of the world is tensor rank `s` of planner rank `p`, for degree `t`.

    Attention runs among the ranks of equal tensor rank: each of them holds the same tokens as its
    neighbours and its own share of the heads.

    Attributes:
        world_size: ranks that run.
        rank: the calling one.
        tensor_parallel_degree: ranks that hold one model between them.
        node_of: each planner rank's node; empty: all are on one.
        inner_degree: planner ranks of a node for strategies in two levels; None: those of a group
            that are on one node.
    """

    world_size: int
    rank: int
    tensor_parallel_degree: int = 1
    node_of: tuple[int, ...] = ()
    inner_degree: int | None = None

    def __post_init__(self) -> None:
        if self.world_size % self.tensor_parallel_degree:
            raise ConfigError(
                f"engine.tensor_parallel_degree {self.tensor_parallel_degree} does not divide the "
                f"{self.world_size} ranks that run; start a multiple of it"
            )

    @property
    def plan_world_size(self) -> int:
        """Ranks that the planner sees."""
        return self.world_size // self.tensor_parallel_degree

    @property
    def plan_rank(self) -> int:
        """This rank as the planner counts."""
        return self.rank // self.tensor_parallel_degree

    @property
    def tensor_rank(self) -> int:
        """This rank among those that share its model."""
        return self.rank % self.tensor_parallel_degree

    def members(self, plan_ranks: Iterable[int]) -> tuple[int, ...]:
        """Ranks of a planned group that have this rank's share of the heads."""
        return tuple(p * self.tensor_parallel_degree + self.tensor_rank for p in plan_ranks)

    def everyone(self, plan_ranks: Iterable[int]) -> list[tuple[int, ...]]:
        """The attention groups of a planned group, one per tensor rank."""
        degree = self.tensor_parallel_degree
        ranks = tuple(plan_ranks)
        return [tuple(p * degree + s for p in ranks) for s in range(degree)]

    def inner_size(self, plan_ranks: Iterable[int], strategy: str) -> int | None:
        """Ranks of each node of a planned group, None for strategies in one level.

        Nodes that hold different numbers of the group's ranks are cut into equal parts.
        """
        ranks = tuple(plan_ranks)
        if "+" not in strategy:
            return None
        if self.inner_degree is not None:
            return self.inner_degree
        nodes = [self.node_of[r] if self.node_of else 0 for r in ranks]
        return math.gcd(*(len(list(run)) for _, run in itertools.groupby(nodes)))

    def rank_sets(self, plan_ranks: Iterable[int], strategy: str) -> list[tuple[int, ...]]:
        """All sets of ranks that communicate when a planned group computes."""
        ranks = tuple(plan_ranks)
        inner_size = self.inner_size(ranks, strategy)
        sets = self.everyone(ranks)
        if inner_size is None:
            return sets
        return [s for members in sets for s in two_level_sets(members, inner_size)]
