"""`dist-attn plan`: a plan for a list of lengths, without training and without the cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dist_attn.config import Config
from dist_attn.errors import PlanError, UserError
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.compare import Case, comparison, comparison_page, legend
from dist_attn.planner.fitting import cost_model, described_cluster, layer_rules_of
from dist_attn.planner.lengths import read_lengths
from dist_attn.planner.mask_picture import mask_figure
from dist_attn.planner.plan import Plan
from dist_attn.planner.preview import print_plan, write_preview
from dist_attn.planner.problem import plan_as_configured
from dist_attn.planner.shape import ModelShape
from dist_attn.planner.solve import static_plan
from dist_attn.planner.tensor_parallel import tensor_parallel_cluster, tensor_parallel_shape


def run_plan_command(
    config: Config, lengths_file: str | Path, out: str | Path, console: Console | None = None
) -> Plan:
    """Plan the lengths of a file, print the plan, and write plan.json, plan.png and plan.html.

    Masks of layers are drawn as masks.png.

    Raises:
        UserError: the configuration, the lengths or the batch is refused; nothing is written then.
    """
    console = console or Console(highlight=False)
    made = _plan(config, read_lengths(lengths_file))
    print_plan(made.found, made.static, console)
    files = _write(made, Path(out))
    console.print("wrote " + ", ".join(str(f) for f in files), soft_wrap=True)
    return made.found


def run_compare_command(
    cases: Sequence[tuple[str, Config, Path]], out: str | Path, console: Console | None = None
) -> list[Plan]:
    """Plan every case, print one row for each, and write comparison.html and each plan's files.

    Args:
        cases: a name, a configuration and a file of lengths each.
        out: a folder; every case gets a folder of its name in it.
        console: where to print.

    Raises:
        UserError: as `run_plan_command`, naming the case.
    """
    console = console or Console(highlight=False)
    made, folders = [], []
    for name, config, lengths_file in cases:
        try:
            made.append(_plan(config, read_lengths(lengths_file)))
        except UserError as error:
            raise type(error)(f"{name}: {error}") from None
        folders.append(Path(out) / re.sub(r"[^\w.-]+", "-", name))
    compared = [Case(name, m.found, m.static) for (name, _, _), m in zip(cases, made, strict=True)]
    for line in legend(compared):
        console.print(line)
    console.print(comparison(compared))
    for one, folder in zip(made, folders, strict=True):
        _write(one, folder)
    page = Path(out) / "comparison.html"
    try:
        page.write_text(comparison_page(compared, folders), encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot write {page}: {error}") from None
    console.print(f"wrote {page} and a folder for each plan", soft_wrap=True)
    return [m.found for m in made]


@dataclass(frozen=True)
class _Made:
    found: Plan
    static: Plan | None
    rules: LayerRules | None


def _plan(config: Config, lengths: list[int]) -> _Made:
    cluster = described_cluster(config)
    config = config.on("cpu" if all(d.name == "cpu" for d in cluster.devices) else "cuda")
    whole = ModelShape.from_config(config.model)
    rules = layer_rules_of(config, whole)
    degree = config.engine.tensor_parallel_degree
    shape = tensor_parallel_shape(whole, degree)
    cluster = tensor_parallel_cluster(cluster, shape, degree)
    cost = cost_model(config, cluster, shape, rules, longest=max(lengths, default=0))
    strategies = config.attention.strategies
    found = plan_as_configured(lengths, cluster, cost, config.planner, strategies, config.run.seed)
    static = static_plan(lengths, cluster, cost, config.planner, strategies, config.run.seed)
    return _Made(found, static, rules)


def _write(made: _Made, out: Path) -> list[Path]:
    try:
        files = [*write_preview(made.found, made.static, out)]
        if made.rules is not None:
            files.append(out / "masks.png")
            mask_figure(made.rules).savefig(files[-1], dpi=120)
    except OSError as error:
        raise PlanError(f"cannot write into {out}: {error}") from None
    return files
