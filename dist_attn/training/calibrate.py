"""`dist-attn calibrate`: measure the machine at hand, and fit the planner's costs to it.

Every rank runs the configured model, forward and backward, on packed documents of its own; then
groups of every size exchange messages as attention does; then groups run the model together, whose
times are predicted from the fits and not used for them.

A model of many layers that are alike is measured with two and with four of them, and each point
extrapolated to all, so that a model fits one device whose training shards it over many. Where masks
differ by layer, all layers are measured.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dist_attn.config import Config
from dist_attn.errors import ConfigError
from dist_attn.groups import GroupPool, single_rank_group
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.calibration import (
    Calibration,
    Check,
    ComputePoint,
    Fit,
    MemoryPoint,
    calibrated,
    fit_compute,
    fit_memory,
    fit_transfer,
)
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.fitting import derived_costs, layer_rules_of
from dist_attn.planner.shape import ModelShape
from dist_attn.training.calibrate_links import LinkPoint, group_sets, measure_links
from dist_attn.training.probe import Probe, Probed
from dist_attn.training.runtime import Runtime, choose_device, joined
from dist_attn.training.setup import cluster_at_hand
from dist_attn.training.watchdog import SETUP

logger = logging.getLogger(__name__)

#: Of a model with more layers than the last, these many are measured.
_DEPTHS = (2, 4)
#: Tokens of the longest document, where nothing else is asked for.
_MAX_TOKENS = {"cpu": 2048, "cuda": 65536}


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    max_tokens: int | None = None
    repeats: int = 5
    #: Passes before those that count: they compile kernels, and make gradients' memory.
    warm_ups: int = 2
    #: Tokens in sixteenths of the most, and in how many documents of equal length.
    sixteenths: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    documents: tuple[int, ...] = (1, 4, 16)


@dataclass(frozen=True)
class _Machine:
    """What the measurements are of."""

    config: Config
    runtime: Runtime
    cluster: Cluster
    derived: CostModel
    rules: LayerRules | None
    depths: tuple[int, ...]
    probes: tuple[Probe, ...]
    mark: Callable[[str], None]

    def at_full_depth(self, values: list[float]) -> float:
        """Extrapolate a measurement at each depth to all layers."""
        if len(values) == 1:
            return values[0]
        per_layer = (values[1] - values[0]) / (self.depths[1] - self.depths[0])
        return values[1] + (self.derived.shape.num_layers - self.depths[1]) * max(per_layer, 0.0)


def calibrate(config: Config, out: Path, extent: Extent) -> None:
    """Measure, fit, report, and write `out`.

    Raises:
        ConfigError: on every rank, when ranks have different devices or measurements do not
            determine the costs.

    Collective: by all ranks; the process group is made from the environment and ended.
    """
    config = config.on(choose_device(config.run.device, 0).type)
    with joined(config.run) as (runtime, mark):
        measure(config, out, extent, runtime, partial(mark, SETUP))


def measure(
    config: Config,
    out: Path,
    extent: Extent,
    runtime: Runtime,
    mark: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Calibrate on a process group that exists; see `calibrate`. Tells `mark` what comes next."""
    begun = time.monotonic()

    def tell(what: str) -> None:
        mark(what)
        if runtime.is_main:
            logger.info("%.0f s: %s", time.monotonic() - begun, what)

    machine = _machine(config, runtime, tell)
    pool = GroupPool(max(64, 2 * runtime.world_size))
    longest = extent.max_tokens or _MAX_TOKENS[runtime.device.type]
    compute, memory = _alone(machine, longest, extent)
    tell("measuring exchanges")
    links = measure_links(runtime, pool, extent.repeats)
    with runtime.together():
        made = Calibration(
            device=machine.cluster.devices[0].name,
            model=asdict(machine.derived.shape),
            compute=fit_compute(compute),
            intra_node=_fit_links(links, crosses_nodes=False),
            inter_node=_fit_links(links, crosses_nodes=True),
            memory=fit_memory(memory) if memory else None,
        )
        fitted = calibrated(
            machine.derived,
            [made],
            [d.name for d in machine.cluster.devices],
            machine.derived.shape,
        )
    checks = _together(machine, fitted, pool, longest, extent)
    pool.close()
    made = Calibration(**{**vars(made), "checks": tuple(checks)})
    with runtime.together():
        if runtime.is_main:
            try:
                made.save(out)
            except OSError as error:
                raise ConfigError(f"cannot write {out}: {error}; name another file") from None
            _report(made, links, machine)
            logger.info("wrote %s; plans read it by `cost: {calibrations: [%s]}`", out, out)
    return made


def _machine(config: Config, runtime: Runtime, mark: Callable[[str], None]) -> _Machine:
    cluster = cluster_at_hand(config, runtime)
    with runtime.together():
        if len(cluster.devices) > 1:
            raise ConfigError(
                f"calibrate measures one kind of device at a time, the ranks have "
                f"{', '.join(d.name for d in cluster.devices)}; start it on one kind, once for each"
            )
        shape = ModelShape.from_config(config.model)
        rules = layer_rules_of(config, shape)
        derived = derived_costs(config, cluster, shape, rules, config.data.max_document_tokens)
        if config.engine.tensor_parallel_degree > 1:
            raise ConfigError(
                f"calibrate measures whole models, engine.tensor_parallel_degree is "
                f"{config.engine.tensor_parallel_degree}; set it to 1"
            )
        alike = rules is None or len(rules.distinct) == 1
        depths: tuple[int, ...] = (shape.num_layers,)
        if shape.num_layers > _DEPTHS[-1] and alike:
            depths = _DEPTHS
        of_depth = [rules and rules.first(depth) for depth in depths]
        probes = tuple(
            Probe(config, replace(shape, num_layers=depth), own, runtime.device)
            for depth, own in zip(depths, of_depth, strict=True)
        )
    return _Machine(config, runtime, cluster, derived, rules, depths, probes, mark)


def _alone(
    machine: _Machine, longest: int, extent: Extent
) -> tuple[list[ComputePoint], list[MemoryPoint]]:
    """One rank each: whole documents and pieces of them, from a sixteenth of the longest on."""
    compute, memory = [], []
    group = single_rank_group(machine.runtime.rank)
    for tokens, count in _grid(longest, extent):
        machine.mark(f"measuring {count} documents of {tokens} tokens in all")
        documents = [tokens // count] * count
        passes = extent.warm_ups, extent.repeats
        found = [p.run(documents, group, "local", passes) for p in machine.probes]
        seconds = _slowest(machine, found)
        for probe in machine.probes:
            probe.forget()
        if seconds is None:
            if machine.runtime.is_main:
                logger.info("%d tokens do not fit the memory and are left out", tokens)
            continue
        pairs = float(machine.derived.pairs(np.array(documents)).sum())
        compute.append(ComputePoint(sum(documents), pairs, seconds))
        peaks = [float(p.peak_bytes) for p in found if p is not None]
        if min(peaks) > 0:
            memory.append(MemoryPoint(sum(documents), machine.at_full_depth(peaks)))
    return compute, memory


def _grid(longest: int, extent: Extent) -> list[tuple[int, int]]:
    """Tokens, and in how many documents of equal length."""
    tokens = [max(longest * k // 16, 16) for k in extent.sixteenths]
    return [(n, c) for n in tokens for c in extent.documents if n >= 2 * c]


def _slowest(machine: _Machine, found: list[Probed | None]) -> float | None:
    """Of the ranks, which all work at once as in training; None where it fits none or not all."""
    mine = None
    if all(p is not None for p in found):
        mine = machine.at_full_depth([p.seconds for p in found if p is not None])
    of_all: list[float | None] = machine.runtime.gather(mine)
    known = [s for s in of_all if s is not None]
    return statistics.median(known) if len(known) == len(of_all) else None


def _fit_links(links: list[LinkPoint], *, crosses_nodes: bool) -> Fit | None:
    points = [p.point for p in links if p.crosses_nodes == crosses_nodes]
    return fit_transfer(points) if points else None


def _together(
    machine: _Machine, fitted: CostModel, pool: GroupPool, longest: int, extent: Extent
) -> list[Check]:
    """Groups of every size run one document per rank's worth of tokens; see the module."""
    checks = []
    for (size, crosses), sets in group_sets(machine.runtime).items():
        pool.ensure(sets)
        mine = next((s for s in sets if machine.runtime.rank in s), None)
        for strategy in machine.config.attention.strategies:
            if "+" in strategy:
                continue  # Two levels are costed by the links of each.
            kind = GroupKind(size, strategy, 0, crosses)
            if not fitted.allows(kind):
                continue
            machine.mark(f"measuring {strategy} of {size} ranks")
            documents = [longest // 2]
            found: list[Probed | None] = []
            for probe in machine.probes:
                if mine is None:
                    found.append(Probed(0.0, 0))
                else:
                    passes = extent.warm_ups, extent.repeats
                    found.append(probe.run(documents, pool.get(mine), strategy, passes))
                probe.forget()
            seconds = _slowest(machine, found)
            if seconds is None or not seconds:
                continue
            array = np.array(documents)
            predicted = fitted.fixed_s(kind) + float(
                fitted.compute_s(kind, array)[0] + fitted.communication_s(kind, array)[0]
            )
            checks.append(Check(size, strategy, crosses, documents[0], seconds, predicted))
    return checks


def _report(made: Calibration, links: list[LinkPoint], machine: _Machine) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("fitted", "terms", "mean error", "max error"):
        table.add_column(title, justify="right" if "error" in title else "left")
    constant, linear, pair = made.compute.coefficients
    rows = [
        ("compute", made.compute, f"{constant:.3g} s + {linear:.3g} s/token + {pair:.3g} s/pair")
    ]
    for name, fit in (("inside nodes", made.intra_node), ("across nodes", made.inter_node)):
        if fit is not None:
            latency, per_byte = fit.coefficients
            rate = f"{1e-9 / per_byte:.3g} GB/s" if per_byte else "no term per byte"
            rows.append((name, fit, f"{latency * 1e6:.3g} us + {rate}"))
    if made.memory is not None:
        rows.append(("memory", made.memory, f"{made.memory.coefficients[1]:.4g} bytes/token"))
    for name, fit, terms in rows:
        table.add_row(name, terms, f"{fit.mean_error:.1%}", f"{fit.max_error:.1%}")
    console.print(table)
    console.print("errors are of points that were held out")
    if 0 in (linear, pair):
        what = "attention" if pair == 0 else "the rest of a layer"
        logger.warning(
            "%s was lost in the noise and would cost plans nothing; measure longer documents by "
            "--max-tokens, or oftener by --repeats", what,
        )  # fmt: skip
    if made.memory is None:
        console.print("memory per token is measured on GPUs only: it stays derived")
    if len(machine.depths) > 1:
        console.print(
            f"measured with {machine.depths[0]} and {machine.depths[1]} layers, extrapolated to "
            f"{machine.derived.shape.num_layers}"
        )
    for check in made.checks:
        where = "across nodes" if check.crosses_nodes else "inside a node"
        console.print(
            f"degree {check.degree} {check.strategy} {where}, {check.tokens:,} tokens: measured "
            f"{check.measured_s:.4g} s, predicted {check.predicted_s:.4g} s ({check.error:+.0%})"
        )
    for degree, crosses in dict.fromkeys((p.degree, p.crosses_nodes) for p in links):
        parts = []
        for operation in ("all-to-all", "ring", "gather"):
            best = max(
                p.point.num_bytes / p.point.seconds
                for p in links
                if (p.operation, p.degree, p.crosses_nodes) == (operation, degree, crosses)
            )
            parts.append(f"{operation} {best / 1e9:.3g}")
        where = "across nodes" if crosses else "inside a node"
        console.print(f"{degree} ranks {where}, GB/s at best: {', '.join(parts)}")
