"""`dist-attn plan`: a plan for a list of lengths, without training and without the cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dist_attn.config import ClusterConfig, Config
from dist_attn.errors import ConfigError, PlanError
from dist_attn.masks.layers import LayerRules, layer_rules, mean_area
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.lengths import read_lengths
from dist_attn.planner.mask_picture import mask_figure
from dist_attn.planner.memory import Sharding
from dist_attn.planner.plan import Plan
from dist_attn.planner.preview import print_plan, write_preview
from dist_attn.planner.shape import ModelShape
from dist_attn.planner.solve import plan, static_plan
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
    lengths = read_lengths(lengths_file)
    cluster = described_cluster(config)
    config = config.on("cpu" if all(d.name == "cpu" for d in cluster.devices) else "cuda")
    whole = ModelShape.from_config(config.model)
    rules = layer_rules_of(config, whole)
    degree = config.engine.tensor_parallel_degree
    shape = tensor_parallel_shape(whole, degree)
    cluster = tensor_parallel_cluster(cluster, shape, degree)
    cost = cost_model(config, cluster, shape, rules, longest=max(lengths, default=0))
    strategies = config.attention.strategies
    found = plan(lengths, cluster, cost, config.planner, strategies, config.run.seed)
    static = static_plan(lengths, cluster, cost, config.planner, strategies, config.run.seed)
    print_plan(found, static, console)
    try:
        files = [*write_preview(found, static, out)]
        if rules is not None:
            files.append(Path(out) / "masks.png")
            mask_figure(rules).savefig(files[-1], dpi=120)
    except OSError as error:
        raise PlanError(f"cannot write into {out}: {error}") from None
    console.print("wrote " + ", ".join(str(f) for f in files), soft_wrap=True)
    return found


def described_cluster(config: Config) -> Cluster:
    """The cluster of a configuration, which must describe it.

    Raises:
        ConfigError: the configuration leaves the cluster to the ranks that run.
    """
    if not isinstance(config.cluster, ClusterConfig):
        raise ConfigError(
            "cluster is 'auto', which only a run can resolve; name a cluster file, such as "
            "--set cluster=configs/clusters/h100_64.yaml"
        )
    return Cluster.from_config(config.cluster)


def layer_rules_of(config: Config, shape: ModelShape) -> LayerRules | None:
    """What each layer of the model sees; None where all are causal.

    Raises:
        ConfigError: `attention.masks` names layers or heads that the model does not have.
    """
    return layer_rules(
        config.attention.masks, shape.num_layers, shape.num_heads, shape.num_kv_heads
    )


def cost_model(
    config: Config, cluster: Cluster, shape: ModelShape, rules: LayerRules | None, longest: int
) -> CostModel:
    """The derived cost model of a run whose documents have up to `longest` tokens."""
    cost = CostModel.derive(
        shape,
        cluster,
        Sharding.from_config(config, shape),
        config.planner.max_tokens_per_device,
        mean_area(rules, longest),
    )
    return replace(cost, inner_degree=config.attention.inner_degree)
