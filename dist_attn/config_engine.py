"""The parts of the configuration that describe the engine and its optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_attn.config_section import Fraction, NonNegative, Positive, PositiveFloat, Section


class EngineConfig(Section):
    """The training engine and its sharding."""

    name: Literal["deepspeed", "megatron"] = "deepspeed"
    #: megatron: 1, which is what its distributed optimizer does.
    zero_stage: Literal[0, 1, 2, 3] = 2
    #: Communication buckets, in elements.
    bucket_elements: Positive = 1_000_000
    #: Keep the optimizer's state, and the update, on the host (deepspeed, zero_stage 1 to 3).
    offload_optimizer: bool = False
    #: Keep the parameters on the host between uses (deepspeed, zero_stage 3).
    offload_parameters: bool = False
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
        self._check_offload()
        if self.name == "deepspeed" and self.tensor_parallel_degree != 1:
            raise ValueError(
                f"tensor_parallel_degree {self.tensor_parallel_degree} needs name 'megatron'; "
                f"deepspeed shards over all ranks by zero_stage"
            )
        return self

    def _check_offload(self) -> None:
        if self.name == "megatron" and (self.offload_optimizer or self.offload_parameters):
            raise ValueError(
                "offload_optimizer and offload_parameters are deepspeed's; leave them out, or use "
                "name 'deepspeed'"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3, got 0")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage 3, got {self.zero_stage}")


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
