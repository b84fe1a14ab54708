"""Plans for coming steps, solved in a process of their own while the current step runs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dist_attn.errors import ConfigError, NodeError, PlanError
from dist_attn.planner.plan import Plan
from dist_attn.planner.problem import PlanningProblem
from dist_attn.planner.solver_process import SolverProcess
from dist_attn.training.runtime import Runtime
from dist_attn.training.stop import shielded

logger = logging.getLogger(__name__)


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
        self._pending: dict[int, tuple[int, ...]] = {}
        self._solver = SolverProcess(problem, problem.config.give_up_s)

    @property
    def node_of(self) -> tuple[int, ...]:
        """The node of every rank that plans know."""
        return self._problem.cluster.node_of

    def prepare(self, step: int, lengths: tuple[int, ...]) -> None:
        """Begin to solve a coming step, unless its plan is there already. Rank 0 works."""
        if not self._runtime.is_main or step in self._pending or self._given is not None:
            return
        if self._kept(step, lengths) is not None:
            return
        self._pending[step] = lengths
        with shielded():
            self._solver.submit(lengths)

    def take(
        self, step: int, lengths: tuple[int, ...], check: Callable[[], None] = lambda: None
    ) -> tuple[Plan, float]:
        """The plan of a step, and the seconds that this rank waited for it.

        Args:
            step: the step.
            lengths: of its documents.
            check: called by every rank first; a UserError of any ends all of them.

        Collective: by all ranks; one broadcast of the plan's JSON and one gather of digests.

        Raises:
            UserError: on every rank, when the batch cannot be planned, a given plan does not fit,
                or it cannot be kept in the run's folder.
            NodeError: on every rank, naming the ranks that hold another plan than most.
        """
        begun = time.perf_counter()
        text = None
        with self._runtime.together():
            check()
            if self._runtime.is_main:
                text = self._take(step, lengths).to_json()
        result = Plan.from_json(self._runtime.broadcast(text), source=f"plan of step {step}")
        digests = self._runtime.gather(result.digest())
        self._compare(step, digests)
        return result, time.perf_counter() - begun

    def close(self) -> None:
        """End the solver's process."""
        self._solver.close()

    def _compare(self, step: int, digests: list[str]) -> None:
        (usual, _), *others = Counter(digests).most_common()
        if not others:
            return
        nodes = self._runtime.nodes or ("this node",) * len(digests)
        different = [
            f"rank {rank} on {nodes[rank]} ({digest[:12]})"
            for rank, digest in enumerate(digests)
            if digest != usual
        ]
        raise NodeError(
            f"step {step}: {', '.join(different)} received another plan than the other ranks "
            f"({usual[:12]}), which its memory or network must have changed; no rank began the "
            f"step. Check the node with `dist-attn preflight`, then --resume"
        )

    def _take(self, step: int, lengths: tuple[int, ...]) -> Plan:
        if self._given is not None:
            return self._load(self._given / _name(step), lengths)
        kept = self._kept(step, lengths)
        if kept is not None:
            return kept
        self.prepare(step, lengths)
        assert self._pending.pop(step) == lengths, "a plan was prepared for another batch"
        with shielded():
            result = self._solver.take(lengths)
        try:
            result.save(self._folder / _name(step))
        except OSError as error:
            raise ConfigError(f"run.dir: cannot write {self._folder}: {error}") from None
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
