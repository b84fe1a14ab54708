"""Step times as a calibration on the device at hand predicts them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dist_attn.config import Config, CostConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.fitting import planning_problem_of
from dist_attn.planner.plan import Plan
from dist_attn.training.calibrate import Extent, measure
from dist_attn.training.runtime import Runtime

#: Tokens of the longest document that is measured, without and with recomputation.
LONGEST = {False: 32768, True: 65536}


class Predictions:
    """One calibration for each kind of case, made when the first of its cases comes.

    Each is short: three lengths, whole and in eight documents, and of three passes the last counts.
    """

    def __init__(self, folder: Path, runtime: Runtime, cluster: Cluster) -> None:
        self._folder = folder
        self._runtime = runtime
        self._cluster = cluster
        self._files: dict[tuple[bool, bool], Path] = {}
        #: Spent on calibrations.
        self.seconds = 0.0

    def of(self, config: Config, plan: Plan) -> float:
        """Predicted seconds of a plan under a configuration."""
        key = (bool(config.attention.masks), config.model.gradient_checkpointing)
        if key not in self._files:
            self._files[key] = self._calibrate(config, plan, key)
        costs = CostConfig(calibrations=[str(self._files[key])])
        problem = planning_problem_of(
            config.model_copy(update={"cost": costs}), self._cluster, config.model.vocab_size or 0
        )
        kind = GroupKind(1, "local")
        lengths = np.array(plan.lengths)
        return sum(
            problem.cost.fixed_s(kind)
            + float(problem.cost.compute_s(kind, lengths[list(group.documents)]).sum())
            for micro_batch in plan.micro_batches
            for group in micro_batch.groups
        )

    def _calibrate(self, config: Config, plan: Plan, key: tuple[bool, bool]) -> Path:
        began = time.perf_counter()
        sparse, recomputed = key
        name = f"{'s2' if sparse else 'dense'}{'-recomputed' if recomputed else ''}.yaml"
        most = max(g.tokens for m in plan.micro_batches for g in m.groups)
        extent = Extent(
            max_tokens=min(most, LONGEST[recomputed]), repeats=1, warm_ups=2,
            sixteenths=(4, 8, 16), documents=(1, 8),
        )  # fmt: skip
        measure(config, self._folder / name, extent, self._runtime)
        self.seconds += time.perf_counter() - began
        return self._folder / name
