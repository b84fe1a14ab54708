"""The part of the configuration that describes the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dist_attn.config_rope import RopeConfig
from dist_attn.config_section import Positive, PositiveFloat, Section

Target = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights, by the package peft."""

    rank: Positive = 16
    #: The adapters' outputs count alpha / rank times.
    alpha: PositiveFloat = 32.0
    targets: Annotated[list[Target], Field(min_length=1)] = [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


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
    #: Base and scaling, in place of `rope_theta` and of what a checkpoint says.
    rope: RopeConfig | None = None
    tie_word_embeddings: bool = False
    #: Train adapters of this rank and leave the model's own weights as they are.
    lora: LoraConfig | None = None
    #: Parameters and activations; the optimizer's copy is float32 in either case. `auto` is bf16 on
    #: GPUs and fp32 on CPUs.
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    #: With gradient_checkpointing, keep what each layer's attention gave (num_heads * head_dim
    #: elements per token and layer) instead of computing attention again.
    keep_attention: bool = True
    #: With gradient_checkpointing, keep the layers' inputs in the host's memory until their
    #: backward; copies run beside the computation.
    offload_checkpoints: bool = False
    #: Compute the MLP so many tokens at a time, and again in its backward; None: all at once.
    mlp_tile_tokens: Positive | None = None
    #: liger: norms, gates and rotations as fused kernels (the package liger-kernel, GPUs only, by
    #: deepspeed). `auto` takes them where they are.
    kernels: Literal["auto", "torch", "liger"] = "auto"
    #: liger: the vocabulary projection and its loss as a fused kernel (the package liger-kernel,
    #: GPUs only, no tensor parallelism); torch: ours, a chunk of tokens at a time. `auto` takes the
    #: kernel where it can be had.
    loss: Literal["auto", "torch", "liger"] = "auto"
    #: Tokens whose logits exist at a time in torch's loss; Liger chooses its own.
    loss_chunk_tokens: Positive = 1024

    @model_validator(mode="after")
    def _checkpoints(self) -> ModelConfig:
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise ValueError(
                "offload_checkpoints moves what gradient_checkpointing keeps; set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self) -> ModelConfig:
        if self.lora is not None and self.mlp_tile_tokens is not None:
            raise ValueError(
                "mlp_tile_tokens computes the MLP from plain matrices and knows no adapters; leave "
                "it or lora out"
            )
        return self

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
