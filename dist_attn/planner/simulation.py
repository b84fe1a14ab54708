"""Playing a plan on a described cluster: layer by layer, with ranks that are not equally quick.

The plan's predicted times take every rank of a group to be equally quick. Here each rank's work in
each layer varies by a random factor, the ranks of a group wait for each other in every layer (they
exchange keys and values there), and groups wait as the plan's synchronisation says. With `free`
placement a rank works on its groups one after the other in every layer, and in each of them waits
for the ranks that it shares documents with. The report says where the ranks' time went.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.planner.costs import FloatArray
from dist_attn.planner.plan import Group, MicroBatch, Plan


@dataclass(frozen=True)
class SimulationReport:
    """One simulated step; the shares are of all ranks' time and add up to one."""

    seconds: float
    predicted_s: float
    compute_share: float
    communication_share: float
    overhead_share: float
    #: Waiting for slower ranks of the own group.
    group_wait_share: float
    #: In no group, or waiting for other groups.
    idle_share: float


def simulate(plan: Plan, num_layers: int, jitter: float = 0.0, seed: int = 0) -> SimulationReport:
    """Play one step.

    Args:
        plan: with either synchronisation.
        num_layers: layers of the model, in which the ranks of a group meet.
        jitter: standard deviation of a rank's time in a layer, relative to its mean.
        seed: of the random factors.

    Raises:
        ValueError: a negative jitter or no layers.
    """
    if jitter < 0 or num_layers < 1:
        raise ValueError(
            f"jitter must be 0 or more and num_layers 1 or more, got {jitter} and {num_layers}"
        )
    generator = np.random.default_rng(seed)
    ready = np.zeros(plan.world_size)
    spent = {"compute": 0.0, "communication": 0.0, "overhead": 0.0, "wait": 0.0}
    for micro_batch in plan.micro_batches:
        if plan.synchronisation == "micro_batch":
            ready[:] = ready.max()
        if plan.placement == "free":
            _play_free(micro_batch, num_layers, jitter, generator, ready, spent)
            continue
        for group in micro_batch.groups:
            ranks = list(group.ranks)
            own, together = _play(group, num_layers, jitter, generator)
            start = float(ready[ranks].max())
            ready[ranks] = start + group.overhead_s + together + group.communication_s
            spent["compute"] += own
            spent["wait"] += together * group.degree - own
            spent["communication"] += group.communication_s * group.degree
            spent["overhead"] += group.overhead_s * group.degree
    seconds = float(ready.max())
    total = seconds * plan.world_size or 1.0
    shares = {name: value / total for name, value in spent.items()}
    return SimulationReport(
        seconds=seconds,
        predicted_s=plan.predicted_s,
        compute_share=shares["compute"],
        communication_share=shares["communication"],
        overhead_share=shares["overhead"],
        group_wait_share=shares["wait"],
        idle_share=1.0 - sum(shares.values()),
    )


def _play_free(
    micro_batch: MicroBatch,
    num_layers: int,
    jitter: float,
    generator: np.random.Generator,
    ready: FloatArray,
    spent: dict[str, float],
) -> None:
    """One micro-batch of `free` placement; adds to `ready` and `spent` in place."""
    ready += micro_batch.overhead_s
    spent["overhead"] += micro_batch.overhead_s * len(ready)
    blocks = [(np.array(g.ranks), np.array(g.rank_s) / num_layers) for g in micro_batch.groups]
    for _ in range(num_layers):
        for group, (ranks, mean) in zip(micro_batch.groups, blocks, strict=True):
            own = mean
            if jitter:
                own = mean * generator.gamma(1 / jitter**2, jitter**2, size=len(ranks))
            start = float(ready[ranks].max())
            spent["wait"] += float((start - ready[ranks]).sum())
            ready[ranks] = start + own
            # A group tells how its slowest rank's time divides.
            computed = group.compute_s / group.time_s if group.time_s else 1.0
            spent["compute"] += float(own.sum()) * computed
            spent["communication"] += float(own.sum()) * (1 - computed)


def _play(
    group: Group, num_layers: int, jitter: float, generator: np.random.Generator
) -> tuple[float, float]:
    """Seconds of computation: of all ranks added up, and until the last has done the last layer."""
    mean = group.compute_s / num_layers
    if jitter == 0:
        return group.compute_s * group.degree, group.compute_s
    # Gamma: positive, with the mean and the spread asked for.
    shape = 1 / jitter**2
    times = mean * generator.gamma(shape, 1 / shape, size=(num_layers, group.degree))
    return float(times.sum()), float(times.max(axis=1).sum())
