"""All that a plan depends on besides the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_attn.config import PlannerConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import Costs
from dist_attn.planner.free import plan_free
from dist_attn.planner.plan import Plan
from dist_attn.planner.solve import plan
from dist_attn.planner.step_plan import plan_step


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
        return plan_as_configured(
            lengths, self.cluster, self.cost, self.config, self.strategies, self.seed
        )


def plan_as_configured(
    lengths: Sequence[int],
    cluster: Cluster,
    cost: Costs,
    planner: PlannerConfig,
    strategies: Sequence[str],
    seed: int = 0,
) -> Plan:
    """Plan one batch with the placement and the synchronisation that `planner` asks for."""
    if planner.placement == "free":
        return plan_free(lengths, cluster, cost, planner, strategies, seed)
    if planner.synchronisation == "step":
        return plan_step(lengths, cluster, cost, planner, strategies, seed)
    return plan(lengths, cluster, cost, planner, strategies, seed)
