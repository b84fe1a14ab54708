"""The run configuration: YAML into typed, validated classes, with every cross-field check.

`load_config` is the only entrance. A wrong key, type or combination raises `ConfigError` that
names the key path, what was given and what is allowed. Nothing here imports torch, so that a
configuration is refused before any rank starts work. Larger sections have files of their own,
`config_<area>.py`, and are imported from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from dist_attn.config_attention import AttentionConfig
from dist_attn.config_cost import CostConfig
from dist_attn.config_data import BatchConfig, CorpusConfig, DataConfig, SourceConfig
from dist_attn.config_device import decide
from dist_attn.config_engine import EngineConfig, OptimizerConfig
from dist_attn.config_masks import LayerMaskConfig
from dist_attn.config_model import LoraConfig, ModelConfig
from dist_attn.config_planner import (
    ClusterConfig,
    DeviceConfig,
    LinkConfig,
    NodesConfig,
    PlannerConfig,
)
from dist_attn.config_rope import RopeConfig
from dist_attn.config_section import NonNegative, Positive, PositiveFloat, Section
from dist_attn.config_stages import StageConfig, check_ends
from dist_attn.config_yaml import override, read_yaml, validate

__all__ = [
    "AttentionConfig",
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "DeviceConfig",
    "EngineConfig",
    "LayerMaskConfig",
    "LinkConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "NodesConfig",
    "OptimizerConfig",
    "PlannerConfig",
    "RopeConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "dump_config",
    "load_cluster",
    "load_config",
    "read_yaml",
    "validate",
]


class RunConfig(Section):
    """What is run, where its results go, and on which devices."""

    dir: str = "runs/default"
    steps: Positive = 100
    seed: NonNegative = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: GPU ranks of a node that may all run on the same CPUs share them out, each near its GPU.
    bind_cpus: bool = True
    #: A rank that waits longer than this for the others gives up with an error.
    timeout_s: PositiveFloat = 600.0
    #: What follows a loss or gradient that is NaN or infinite: end the run, or leave the step out.
    nonfinite: Literal["stop", "skip"] = "stop"
    #: A rank is named as slow when it computes so many times as long as the median rank for the
    #: same work, waits left out, in so many steps in a row.
    slow_rank_factor: Annotated[float, Field(gt=1)] = 1.5
    slow_rank_steps: Positive = 10


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
    #: Documents that grow longer in the course of the run; none: the same throughout.
    stages: list[StageConfig] = []

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        check_ends(self.stages)
        if not self.stages:
            _check_batch("data", self.data.batch, self.data.max_document_tokens)
        for i, stage in enumerate(self.stages):
            _check_batch(f"stages.{i}", stage.batch or self.data.batch, stage.max_document_tokens)
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
        if self.engine.name == "megatron" and self.model.lora is not None:
            raise ValueError(
                "model.lora is not carried out by engine 'megatron', whose layers hold queries, "
                "keys and values in one matrix; use engine 'deepspeed'"
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

    def at_stage(self, index: int) -> Config:
        """The configuration of a stage alone; the whole one where there are none."""
        if not self.stages:
            return self
        stage = self.stages[index]
        data = {
            "max_document_tokens": stage.max_document_tokens,
            "batch": stage.batch or self.data.batch,
            "overlong": stage.overlong or self.data.overlong,
        }
        model = {"rope": stage.rope or self.model.rope}
        return self.model_copy(
            update={
                "data": self.data.model_copy(update=data),
                "model": self.model.model_copy(update=model),
                "stages": [],
            }
        )

    def on(self, device_type: str) -> Config:
        """The same configuration with what is `auto` decided for `cpu` or `cuda`.

        Raises:
            ConfigError: what was asked for does not go with the device.
        """
        decided = decide(self.model, self.engine, device_type)
        if not decided:
            return self
        # Validated again: the dtype may not go with the ZeRO stage.
        model = {**self.model.model_dump(), **decided}
        return validate(Config, {**self.model_dump(), "model": model}, "configuration")


def _check_batch(where: str, batch: BatchConfig, max_document_tokens: int) -> None:
    if batch.tokens is not None and batch.tokens < max_document_tokens:
        raise ValueError(
            f"{where}.batch.tokens ({batch.tokens}) is less than {where}.max_document_tokens "
            f"({max_document_tokens}), so that no batch could hold such a document; raise the "
            f"first or lower the second"
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and validate.

    Raises:
        ConfigError: the file, a key, a value or a combination is refused.
    """
    data = read_yaml(path)
    for item in overrides or []:
        override(data, item)
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
