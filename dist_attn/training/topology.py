"""Ranks as the planner counts them: neighbours that hold one model between them are one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dist_attn.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Rank `p * t + s` of the world is tensor rank `s` of planner rank `p`, for degree `t`.

    Attention runs among the ranks of equal tensor rank: each of them holds the same tokens as its
    neighbours and its own share of the heads.
    """

    world_size: int
    rank: int
    tensor_parallel_degree: int = 1

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
