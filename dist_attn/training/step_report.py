"""What the ranks tell each other after a step, and the metrics that become of it."""

from __future__ import annotations

from dataclasses import dataclass

from dist_attn.config import Config
from dist_attn.groups import GroupPool
from dist_attn.planner.memory import GIB
from dist_attn.planner.plan import Plan
from dist_attn.training.metrics import StepMetrics, describe_groups, imbalance, memory_gib
from dist_attn.training.runtime import Runtime
from dist_attn.training.slow_ranks import SlowRanks
from dist_attn.training.stages import Stage
from dist_attn.training.step import StepResult


@dataclass(frozen=True)
class RankReport:
    """What one rank tells the others after a step."""

    seconds: float
    result: StepResult
    memory_gib: float
    #: A stop signal that came to this rank.
    stop: str | None


@dataclass(frozen=True)
class StepOutcome:
    """What every rank knows of a step that was done."""

    step: int
    plan: Plan
    stage: Stage
    plan_wait_s: float
    lr: float
    grad_norm: float


class StepReports:
    """Exchanges reports after each step, and sums them up.

    Args:
        config: the run's.
        runtime: this rank.
        pool: the groups, whose peer memory counts.
    """

    def __init__(self, config: Config, runtime: Runtime, pool: GroupPool) -> None:
        self._runtime = runtime
        self._pool = pool
        self._tensor_parallel_degree = config.engine.tensor_parallel_degree
        self._slow_ranks = SlowRanks(
            config.run.slow_rank_factor,
            config.run.slow_rank_steps,
            runtime.nodes,
            speaks=runtime.is_main,
        )

    def exchange(self, seconds: float, result: StepResult, stop: str | None) -> list[RankReport]:
        """Every rank's report. Collective: by all ranks."""
        memory = memory_gib(self._runtime.device) + self._pool.peer_bytes / GIB
        mine = RankReport(seconds, result, memory, stop)
        return self._runtime.gather(mine)

    def sum_up(self, done: StepOutcome, reports: list[RankReport]) -> StepMetrics:
        """The metrics of a step, the same on every rank; warns of ranks that stay slow."""
        plan = done.plan
        seconds = max(r.seconds for r in reports)
        slowest, ratio = self._slow_ranks.judge(done.step, [r.result.work for r in reports])
        # Neighbours that hold one model between them have the same tokens.
        padding = sum(r.result.padding for r in reports[:: self._tensor_parallel_degree])
        tokens = sum(plan.lengths)
        most_tokens = max(r.result.most_tokens for r in reports)
        return StepMetrics(
            step=done.step,
            loss=reports[0].result.loss,
            lr=done.lr,
            grad_norm=done.grad_norm,
            documents=len(plan.lengths),
            tokens=tokens,
            tokens_per_s=tokens / seconds,
            step_s=seconds,
            predicted_s=plan.predicted_s,
            plan_wait_s=done.plan_wait_s,
            plan_solve_s=plan.solver.seconds,
            plan_gap=plan.gap,
            imbalance=imbalance([r.result.forward_s for r in reports]),
            slowest_rank=slowest,
            slowest_rank_ratio=ratio,
            padding_share=padding / (tokens + padding),
            memory_gib=max(r.memory_gib for r in reports),
            predicted_memory_gib=done.stage.memory.bytes_at(most_tokens) / GIB,
            micro_batches=len(plan.micro_batches),
            groups=describe_groups(plan),
            stage=done.stage.index,
        )
