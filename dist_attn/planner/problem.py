"""All that a plan depends on besides the lengths."""

from __future__ import annotations

from dataclasses import dataclass

from dist_attn.config import PlannerConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.plan import Plan
from dist_attn.planner.solve import plan


@dataclass(frozen=True)
class PlanningProblem:
    """A cluster, its costs, and the rules by which batches are scattered over it."""

    cluster: Cluster
    cost: CostModel
    config: PlannerConfig
    strategies: tuple[str, ...]
    seed: int

    def solve(self, lengths: tuple[int, ...]) -> Plan:
        """Plan one batch."""
        return plan(
            lengths,
            self.cluster,
            self.cost,
            self.config,
            strategies=self.strategies,
            seed=self.seed,
        )
