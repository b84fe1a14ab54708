"""Plans for coming steps, solved in a process of their own while the current step runs."""

from __future__ import annotations

import logging
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.plan import Plan
from dist_attn.planner.solve import plan
from dist_attn.training.runtime import Runtime

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanningProblem:
    """All that a plan depends on besides the lengths."""

    cluster: Cluster
    cost: CostModel
    config: PlannerConfig
    strategies: tuple[str, ...]
    seed: int

    def solve(self, lengths: tuple[int, ...]) -> Plan:
        """Plan one batch; runs in a process without torch."""
        return plan(
            lengths,
            self.cluster,
            self.cost,
            self.config,
            strategies=self.strategies,
            seed=self.seed,
        )


class PlanSource:
    """Gives every rank the same plan of each step.

    Rank 0 solves ahead and keeps each plan as `plans/step-NNNNNN.json` of the run folder; the
    others receive it. A kept plan of the same lengths, cluster and costs is used again, so that a
    resumed run carries out the plans of the run that it continues.
    """

    def __init__(self, problem: PlanningProblem, runtime: Runtime, folder: Path) -> None:
        self._problem = problem
        self._runtime = runtime
        self._folder = folder
        self._given = Path(problem.config.plans_dir) if problem.config.plans_dir else None
        self._pending: dict[int, tuple[tuple[int, ...], Future[Plan]]] = {}
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, step: int, lengths: tuple[int, ...]) -> None:
        """Begin to solve a coming step, unless its plan is there already. Rank 0 works."""
        if not self._runtime.is_main or step in self._pending or self._given is not None:
            return
        if self._kept(step, lengths) is not None:
            return
        if self._pool is None:
            # Forked from a fresh server: the solver's process holds neither torch nor a GPU.
            context = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=context)
        self._pending[step] = (lengths, self._pool.submit(self._problem.solve, lengths))

    def take(self, step: int, lengths: tuple[int, ...]) -> tuple[Plan, float]:
        """The plan of a step, and the seconds that this rank waited for it.

        Collective: by all ranks; one broadcast of the plan's JSON and one gather of digests.

        Raises:
            PlanError: on every rank, when the batch cannot be planned or a given plan does not fit.
        """
        begun = time.perf_counter()
        text = None
        with self._runtime.together():
            if self._runtime.is_main:
                text = self._take(step, lengths).to_json()
        result = Plan.from_json(self._runtime.broadcast(text), source=f"plan of step {step}")
        digests = self._runtime.gather(result.digest())
        assert len(set(digests)) == 1, f"ranks hold different plans of step {step}: {digests}"
        return result, time.perf_counter() - begun

    def close(self) -> None:
        """End the solver's process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self, step: int, lengths: tuple[int, ...]) -> Plan:
        if self._given is not None:
            return self._load(self._given / _name(step), lengths)
        kept = self._kept(step, lengths)
        if kept is not None:
            return kept
        self.prepare(step, lengths)
        asked, future = self._pending.pop(step)
        assert asked == lengths, "a plan was prepared for another batch"
        try:
            result = future.result()
        except BrokenProcessPool:
            raise PlanError(
                f"the planner's process ended while it solved step {step} ({len(lengths)} "
                f"documents); if the machine ran out of memory, lower data.batch"
            ) from None
        result.save(self._folder / _name(step))
        return result

    def _kept(self, step: int, lengths: tuple[int, ...]) -> Plan | None:
        path = self._folder / _name(step)
        if not path.is_file():
            return None
        try:
            kept = self._load(path, lengths)
        except PlanError as error:
            logger.info("step %d is planned anew: %s", step, error)
            return None
        return kept if kept.cost_fingerprint == self._problem.cost.fingerprint() else None

    def _load(self, path: Path, lengths: tuple[int, ...]) -> Plan:
        cluster = self._problem.cluster
        result = Plan.load(
            path, cluster_fingerprint=cluster.fingerprint(), world_size=cluster.world_size
        )
        if result.lengths != lengths:
            raise PlanError(
                f"{path} plans {len(result.lengths)} documents of other lengths than this step's "
                f"{len(lengths)}; plan the corpus and batch size that are trained"
            )
        return result


def _name(step: int) -> str:
    return f"step-{step:06d}.json"
