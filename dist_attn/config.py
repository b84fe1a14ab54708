"""The run configuration: YAML into typed, validated classes, with every cross-field check.

`load_config` is the only entrance. A wrong key, type or combination raises `ConfigError` that
names the key path, what was given and what is allowed. Nothing here imports torch, so that a
configuration is refused before any rank starts work.
"""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dist_attn.config_attention import AttentionConfig
from dist_attn.config_cost import CostConfig
from dist_attn.config_masks import NonNegative, Positive, Section
from dist_attn.errors import ConfigError

PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
T = typing.TypeVar("T", bound=BaseModel)


class RunConfig(Section):
    """What is run, where its results go, and on which devices."""

    dir: str = "runs/default"
    steps: Positive = 100
    seed: NonNegative = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: A rank that waits longer than this for the others gives up with an error.
    timeout_s: PositiveFloat = 600.0
    #: What follows a loss or gradient that is NaN or infinite: end the run, or leave the step out.
    nonfinite: Literal["stop", "skip"] = "stop"
    #: A rank is named as slow when it computes so many times as long as the median rank for the
    #: same work, waits left out, in so many steps in a row.
    slow_rank_factor: Annotated[float, Field(gt=1)] = 1.5
    slow_rank_steps: Positive = 10


class ModelConfig(Section):
    """A Llama-type decoder, built from these sizes or loaded from a local checkpoint folder."""

    #: A folder with config.json and safetensors; the sizes below are then read from it.
    checkpoint: str | None = None
    vocab_size: Positive | None = None
    hidden_size: Positive = 64
    intermediate_size: Positive = 176
    num_layers: Positive = 2
    num_heads: Positive = 4
    num_kv_heads: Positive = 2
    head_dim: Positive | None = None
    rope_theta: PositiveFloat = 10000.0
    tie_word_embeddings: bool = False
    #: Parameters and activations; the optimizer's copy is float32 in either case. `auto` is bf16 on
    #: GPUs and fp32 on CPUs.
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    #: Tokens whose logits exist at a time in the loss.
    loss_chunk_tokens: Positive = 1024

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads when head_dim is not given, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        return self

    @property
    def resolved_head_dim(self) -> int:
        """Head dimension, by default hidden_size / num_heads."""
        return self.head_dim or self.hidden_size // self.num_heads


class CorpusConfig(Section):
    """Where the documents come from."""

    #: stdlib: Python's own source files. text: a folder, one document per file. jsonl and parquet:
    #: one document per row. megatron: an indexed .bin/.idx pair that is tokenised already.
    kind: Literal["stdlib", "text", "jsonl", "parquet", "megatron"] = "stdlib"
    #: File or folder; for megatron the prefix without .bin or .idx. Not used by stdlib.
    path: str | None = None
    #: File names of a text folder.
    glob: str = "**/*.txt"
    #: Field of a JSONL row, or column of a Parquet file, that holds the text.
    field: str = "text"

    @model_validator(mode="after")
    def _path(self) -> CorpusConfig:
        if (self.path is None) != (self.kind == "stdlib"):
            need = "takes no path" if self.kind == "stdlib" else "needs a path"
            raise ValueError(f"kind '{self.kind}' {need}, got path={self.path!r}")
        return self


class BatchConfig(Section):
    """The size of a global batch; exactly one of the two."""

    documents: Positive | None = None
    #: Documents are taken in order until the next one would pass this many tokens.
    tokens: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> BatchConfig:
        if (self.documents is None) == (self.tokens is None):
            raise ValueError("give exactly one of `documents` and `tokens`")
        return self


class DataConfig(Section):
    """The corpus, its tokens, and what makes a global batch."""

    corpus: CorpusConfig = CorpusConfig()
    #: `bytes`, or the path of a Hugging Face tokenizer.json.
    tokenizer: str = "bytes"
    max_document_tokens: Positive = 8192
    #: What happens to a longer document: stop, cut it into several documents, or leave it out.
    overlong: Literal["refuse", "split", "drop"] = "refuse"
    batch: BatchConfig = BatchConfig(tokens=16384)
    shuffle: bool = True
    #: Where tokenised corpora are kept; by default a folder beside the run folder.
    cache_dir: str | None = None
    #: Local tokens are padded up to a multiple of this.
    pad_to_multiple: Positive = 1


class PlannerConfig(Section):
    """How each global batch is scattered over the ranks."""

    #: `planned`: per batch, by search, LP and MILP. `static`: all groups of `static_degree` ranks.
    mode: Literal["planned", "static"] = "planned"
    static_degree: Positive | None = None
    degrees: Literal["powers_of_two", "all"] = "powers_of_two"
    max_degree: Positive | None = None
    max_micro_batches: Positive = 64
    #: `groups`: every document lies evenly on the ranks of one group. `free`: short documents lie
    #: whole on one rank and cost no communication, long ones fill the ranks of a group unevenly.
    placement: Literal["groups", "free"] = "groups"
    #: `micro_batch`: all ranks wait for each other at every micro-batch. `step`: only at the
    #: optimizer step, so that ranks may run different numbers of micro-batches.
    synchronisation: Literal["micro_batch", "step"] = "micro_batch"
    #: A cap on a rank's tokens per micro-batch, beside what its memory allows; a mapping caps the
    #: devices that it names (`{cpu: 2048}`).
    max_tokens_per_device: Positive | dict[str, Positive] | None = None
    time_limit_s: PositiveFloat = 5.0
    #: A solver that is silent for so long, or dies, is replaced once; then the run ends.
    give_up_s: PositiveFloat = 120.0
    #: A folder of plan files (step-000000.json, ...) to carry out instead of solving.
    plans_dir: str | None = None

    @model_validator(mode="after")
    def _static(self) -> PlannerConfig:
        if (self.mode == "static") != (self.static_degree is not None):
            raise ValueError("static_degree goes with mode 'static', and only with it")
        if self.placement == "free" and self.synchronisation == "step":
            raise ValueError(
                "placement 'free' levels the ranks of every micro-batch and is planned for "
                "synchronisation 'micro_batch' only; use placement 'groups' with 'step'"
            )
        return self


class DeviceConfig(Section):
    """One kind of device: what it computes, holds and moves."""

    #: Dense matrix rate in the training dtype, and the shares of it that a layer's matrix products
    #: and attention reach.
    peak_tflops: PositiveFloat
    linear_efficiency: Fraction = 0.55
    attention_efficiency: Fraction = 0.5
    memory_gib: PositiveFloat
    #: Memory that the framework, NCCL and fragmentation take.
    reserved_gib: Annotated[float, Field(ge=0)] = 4.0


class LinkConfig(Section):
    """What one device can send while it receives as much."""

    bandwidth_gb_per_s: PositiveFloat
    latency_us: Annotated[float, Field(ge=0)] = 10.0


class NodesConfig(Section):
    """Equal nodes, `count` of them."""

    count: Positive
    devices_per_node: Positive
    #: A name from the spec sheets (a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-192gb, cpu) or
    #: from the cluster's own `devices`.
    device: str


class ClusterConfig(Section):
    """A cluster, here or elsewhere: nodes, devices and links."""

    nodes: Annotated[list[NodesConfig], Field(min_length=1)]
    devices: dict[str, DeviceConfig] = {}
    intra_node: LinkConfig = LinkConfig(bandwidth_gb_per_s=150.0, latency_us=8.0)
    #: Per device, not per node.
    inter_node: LinkConfig = LinkConfig(bandwidth_gb_per_s=20.0, latency_us=20.0)
    #: Share of attention's time behind which a ring exchange hides; 0 where the cores that compute
    #: also send.
    ring_overlap: Fraction = 0.9
    #: Seconds that every micro-batch costs beside its tokens (launches, ZeRO gathers).
    micro_batch_overhead_s: Annotated[float, Field(ge=0)] = 0.0

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return sum(n.count * n.devices_per_node for n in self.nodes)


class EngineConfig(Section):
    """The training engine and its sharding."""

    name: Literal["deepspeed", "megatron"] = "deepspeed"
    #: megatron: 1, which is what its distributed optimizer does.
    zero_stage: Literal[0, 1, 2, 3] = 2
    #: Communication buckets, in elements.
    bucket_elements: Positive = 1_000_000
    #: Neighbouring ranks that hold one model between them (megatron): the planner counts them as
    #: one rank.
    tensor_parallel_degree: Positive = 1

    @model_validator(mode="before")
    @classmethod
    def _stage_of_megatron(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("name") == "megatron":
            return {"zero_stage": 1, **data}
        return data

    @model_validator(mode="after")
    def _engine(self) -> EngineConfig:
        if self.name == "megatron" and self.zero_stage != 1:
            raise ValueError(
                f"megatron's distributed optimizer shards the optimizer's state, which is "
                f"zero_stage 1, got {self.zero_stage}; leave zero_stage out, or use deepspeed"
            )
        if self.name == "deepspeed" and self.tensor_parallel_degree != 1:
            raise ValueError(
                f"tensor_parallel_degree {self.tensor_parallel_degree} needs name 'megatron'; "
                f"deepspeed shards over all ranks by zero_stage"
            )
        return self


class OptimizerConfig(Section):
    """AdamW or SGD with a warm-up and a decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    #: 0 turns clipping off.
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    warmup_steps: NonNegative = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    min_lr_ratio: Fraction = 0.1


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    #: 0: none but the one at the end.
    every_steps: NonNegative = 0
    keep: Positive = 2
    at_end: bool = True


class LoggingConfig(Section):
    """What is shown and recorded."""

    tensorboard: bool = True
    #: Steps between two pictures of a plan's timeline; 0: none.
    plan_picture_every_steps: NonNegative = 10
    progress_bar: bool = True


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attention: AttentionConfig = AttentionConfig()
    planner: PlannerConfig = PlannerConfig()
    #: `auto` describes the ranks that run; a path names a cluster file; or the cluster itself.
    cluster: str | ClusterConfig = "auto"
    cost: CostConfig = CostConfig()
    engine: EngineConfig = EngineConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        batch = self.data.batch
        if batch.tokens is not None and batch.tokens < self.data.max_document_tokens:
            raise ValueError(
                f"data.batch.tokens ({batch.tokens}) is less than data.max_document_tokens "
                f"({self.data.max_document_tokens}), so that no batch could hold such a document; "
                f"raise the first or lower the second"
            )
        if self.engine.zero_stage == 0 and self.model.dtype == "bf16":
            raise ValueError(
                "engine.zero_stage 0 with model.dtype bf16 accumulates gradients in bf16; "
                "use zero_stage 1, 2 or 3, or dtype fp32"
            )
        if self.planner.placement == "free" and any("+" in s for s in self.attention.strategies):
            raise ValueError(
                f"planner.placement 'free' is planned for strategies in one level, got "
                f"attention.strategies {self.attention.strategies}; use ring, ulysses and gather, "
                f"or placement 'groups'"
            )
        if self.planner.synchronisation == "step" and self.engine.zero_stage >= 2:
            raise ValueError(
                f"planner.synchronisation 'step' lets ranks run different numbers of "
                f"micro-batches, but under engine.zero_stage {self.engine.zero_stage} all ranks "
                f"must meet in every backward; use zero_stage 0 or 1, or synchronisation "
                f"'micro_batch'"
            )
        self._check_tensor_parallel()
        return self

    def _check_tensor_parallel(self) -> None:
        degree = self.engine.tensor_parallel_degree
        if degree > 1 and any(m.differs_by_head for m in self.attention.masks):
            raise ValueError(
                f"attention.masks that differ by head need engine.tensor_parallel_degree 1, got "
                f"{degree}; use causal and window masks, or context parallelism alone"
            )
        if self.model.checkpoint is not None:
            return  # Its sizes are checked when it is read.
        for key in ("num_heads", "num_kv_heads", "intermediate_size"):
            size = getattr(self.model, key)
            if size % degree:
                raise ValueError(
                    f"engine.tensor_parallel_degree {degree} does not divide model.{key} {size}; "
                    f"use a degree that divides it, and context parallelism for the other ranks"
                )

    def on(self, device_type: str) -> Config:
        """The same configuration with what is `auto` decided for `cpu` or `cuda`."""
        if self.model.dtype != "auto":
            return self
        dtype = "bf16" if device_type == "cuda" else "fp32"
        model = self.model.model_copy(update={"dtype": dtype})
        # Validated again: the dtype may not go with the ZeRO stage.
        return validate(Config, {**self.model_dump(), "model": model.model_dump()}, "configuration")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate.

    Raises:
        ConfigError: the file, a key, a value or a combination is refused.
    """
    data = read_yaml(path)
    for item in overrides or []:
        _set(data, item)
    config = validate(Config, data, str(path))
    if config.cost.calibrations:
        files = [
            str(near if (near := Path(path).parent / name).exists() else name)
            for name in config.cost.calibrations
        ]
        config = config.model_copy(update={"cost": CostConfig(calibrations=files)})
    if isinstance(config.cluster, str) and config.cluster != "auto":
        base = Path(path).parent / config.cluster
        file = base if base.exists() else Path(config.cluster)
        return config.model_copy(update={"cluster": load_cluster(file)})
    return config


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster description from a YAML file."""
    return validate(ClusterConfig, read_yaml(path), str(path))


def dump_config(config: BaseModel) -> str:
    """The configuration with every default, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(data).__name__}")
    return data


def validate(kind: type[T], data: dict[str, Any], source: str) -> T:
    """Build `kind` from plain data, turning every complaint into one ConfigError."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = sorted({_complaint(kind, e) for e in error.errors()})
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def _set(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key.path=value, got '{item}'")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value") from None
    *parents, last = key.split(".")
    node = data
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {key}: '{part}' holds {child!r} and has no keys below it")
        node = child
    node[last] = value


def _complaint(kind: type[BaseModel], error: Any) -> str:
    # A union reports each of its members; their names in the path would only confuse.
    loc = [str(p) for p in error["loc"] if not _is_union_member(str(p))]
    path = ".".join(loc) or "configuration"
    given = error["input"]
    shown = (
        f"got {type(given).__name__} {given!r}" if not isinstance(given, dict) else "got a mapping"
    )
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, loc[:-1])
            near = difflib.get_close_matches(loc[-1], known, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            return f"{path}: unknown key; {hint}allowed here: {', '.join(known)}"
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
        case _:
            return f"{path}: {error['msg']}, {shown}"


def _is_union_member(part: str) -> bool:
    return part.endswith("Config") or part in ("str", "int") or part.startswith(("dict[", "constr"))


def _known_keys(kind: type[BaseModel], parents: list[str]) -> list[str]:
    node: Any = kind
    for part in parents:
        fields = getattr(node, "model_fields", {})
        if part in fields:
            node = _section_in(fields[part].annotation)
    return sorted(getattr(node, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    """The section class inside an annotation such as `str | Section` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(a) for a in typing.get_args(annotation))
    return next((f for f in found if f is not None), None)
