"""From a configuration to its planning problem, and what to change when a document does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dist_attn.config import ClusterConfig, Config, validate
from dist_attn.errors import ConfigError, UserError
from dist_attn.masks.layers import LayerRules, layer_rules, mean_area
from dist_attn.planner.calibration import Calibration, calibrated
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.memory import GIB, MemoryModel, Sharding
from dist_attn.planner.problem import PlanningProblem
from dist_attn.planner.shape import ModelShape
from dist_attn.planner.tensor_parallel import tensor_parallel_cluster, tensor_parallel_shape

#: Changes by what they cost in time, the cheapest first.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"model.mlp_tile_tokens": 4096},
    {"model.gradient_checkpointing": True},
    {"model.gradient_checkpointing": True, "model.keep_attention": False},
    {"engine.zero_stage": 2},
    {"engine.zero_stage": 3},
    {"model.gradient_checkpointing": True, "model.offload_checkpoints": True},
    {"engine.offload_optimizer": True},
)
#: How many times the ranks at hand are tried.
_MOST_RANKS = 64


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


def derived_costs(
    config: Config, cluster: Cluster, shape: ModelShape, rules: LayerRules | None, longest: int
) -> CostModel:
    """The derived cost model of a run whose documents have up to `longest` tokens."""
    cost = CostModel.derive(
        shape,
        cluster,
        Sharding.from_config(config, shape, cluster),
        config.planner.max_tokens_per_device,
        mean_area(rules, longest),
    )
    return replace(cost, inner_degree=config.attention.inner_degree)


def cost_model(
    config: Config, cluster: Cluster, shape: ModelShape, rules: LayerRules | None, longest: int
) -> CostModel:
    """The cost model of a run: derived, or fitted where the configuration names calibrations.

    Raises:
        ConfigError: a calibration that cannot be read, or is of another device or model.
    """
    derived = derived_costs(config, cluster, shape, rules, longest)
    if not config.cost.calibrations:
        return derived
    made = [Calibration.load(path) for path in config.cost.calibrations]
    return calibrated(derived, made, [d.name for d in cluster.devices], shape)


def planning_problem_of(config: Config, devices: Cluster, vocab_size: int) -> PlanningProblem:
    """Describe devices and the costs of a run on them to the planner.

    Raises:
        ConfigError: tensor parallelism or masks do not go with model or devices.
    """
    degree = config.engine.tensor_parallel_degree
    whole = ModelShape.from_config(config.model, vocab_size)
    shape = tensor_parallel_shape(whole, degree)
    cluster = tensor_parallel_cluster(devices, shape, degree)
    rules = layer_rules_of(config, whole)
    cost = cost_model(config, cluster, shape, rules, config.data.max_document_tokens)
    return PlanningProblem(
        cluster, cost, config.planner, tuple(config.attention.strategies), config.run.seed
    )


def memory_of(config: Config, problem: PlanningProblem, vocab_size: int) -> MemoryModel:
    """The memory of one rank of a run."""
    shape = ModelShape.from_config(config.model, vocab_size)
    share = tensor_parallel_shape(shape, config.engine.tensor_parallel_degree)
    cluster = problem.cluster
    return MemoryModel.of(share, cluster.world_size, Sharding.from_config(config, share, cluster))


def smallest_change(config: Config, devices: Cluster, vocab_size: int, length: int) -> str:
    """What would let a group hold a document of `length` tokens, in words.

    Single changes are tried before several, and those that cost little time before others; ranks
    are added last.
    """

    def helps(change: dict[str, Any]) -> bool:
        changed = _changed(config, change)
        return changed is not None and _fits(changed, devices, vocab_size, length)

    found = next((c for c in _candidates(config) if helps(c)), None)
    if found is not None:
        for key in list(found):  # of several changes those that it needs
            fewer = {k: v for k, v in found.items() if k != key}
            found = fewer if fewer and helps(fewer) else found
        settings = " ".join(f"--set {k}={_yaml(v)}" for k, v in found.items())
        return f"the smallest change that would fit it: {settings}"
    best = _changed(config, _all_changes(config)) or config
    for candidate, words in ((config, ""), (best, " with all of the above")):
        times = 2
        while times <= _MOST_RANKS:
            if _fits(candidate, _repeated(devices, times), vocab_size, length):
                ranks = times * devices.world_size
                return f"the smallest change that would fit it: {ranks} such ranks{words}"
            times *= 2
    needed = f"{_MOST_RANKS} times as many ranks would not hold it either"
    return f"no change of recomputation, offload or ZeRO stage fits it, and {needed}"


def describe_capacity(config: Config, problem: PlanningProblem, vocab_size: int) -> str:
    """The tokens that a rank can hold, and what its memory holds then."""
    tokens = problem.cost.tokens_per_device()
    memory = memory_of(config, problem, vocab_size)
    room = min(d.memory_bytes for d in problem.cluster.devices) / GIB
    return f"a rank of {room:.1f} GiB holds {tokens:,} tokens, {memory.statement(tokens)}"


def _candidates(config: Config) -> Iterator[dict[str, Any]]:
    yield from (c for c in _CHANGES if _matters(config, c))
    several: dict[str, Any] = {}
    for change in _CHANGES:
        if _matters(config, change):
            several = {**several, **change}
            yield several


def _all_changes(config: Config) -> dict[str, Any]:
    return {k: v for c in _CHANGES if _matters(config, c) for k, v in c.items()}


def _matters(config: Config, change: dict[str, Any]) -> bool:
    """Whether something of a change is not so already, and nothing of it a step back."""
    for key, value in change.items():
        section, name = key.split(".")
        now = getattr(getattr(config, section), name)
        if name == "zero_stage":
            return config.engine.name == "deepspeed" and bool(value > now)
        if now != value and not (name == "mlp_tile_tokens" and now is not None):
            return True
    return False


def _changed(config: Config, change: dict[str, Any]) -> Config | None:
    """The configuration with a change; None where that is refused."""
    data = config.model_dump()
    for key, value in change.items():
        section, name = key.split(".")
        data[section][name] = value
    try:
        return validate(Config, data, "change")
    except UserError:
        return None


def _fits(config: Config, devices: Cluster, vocab_size: int, length: int) -> bool:
    try:
        planning_problem_of(config, devices, vocab_size).solve((length,))
    except UserError:
        return False
    return True


def _repeated(devices: Cluster, times: int) -> Cluster:
    nodes = devices.num_nodes
    return replace(
        devices,
        node_of=tuple(node + t * nodes for t in range(times) for node in devices.node_of),
        device_of=devices.device_of * times,
    )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
