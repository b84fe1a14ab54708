"""The sizes of a decoder that cost and memory depend on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """A Llama-type decoder: grouped-query attention, gated MLP, no biases."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_element: int = 2
    gradient_checkpointing: bool = False
    keep_attention: bool = True
    tie_word_embeddings: bool = False
    loss_chunk_tokens: int = 1024
    #: Norms, gates and rotations are fused kernels, which keep less.
    fused: bool = False
    #: The loss is Liger's, which chooses its own chunks.
    fused_loss: bool = False
    mlp_tile_tokens: int | None = None
    offload_checkpoints: bool = False
    #: Layers are of Megatron's own modules.
    megatron: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig, vocab_size: int | None = None) -> ModelShape:
        """Read the sizes from the configuration, or from its checkpoint's config.json.

        Args:
            config: the model section of a run configuration.
            vocab_size: the tokenizer's, for a configuration that leaves it to the tokenizer.

        Raises:
            ConfigError: the checkpoint's config.json cannot be read or lacks a size.
        """
        shared: dict[str, Any] = {
            "bytes_per_element": 2 if config.dtype == "bf16" else 4,
            "gradient_checkpointing": config.gradient_checkpointing,
            "keep_attention": config.keep_attention,
            "loss_chunk_tokens": config.loss_chunk_tokens,
            "fused": config.kernels == "liger",
            "fused_loss": config.loss == "liger",
            "mlp_tile_tokens": config.mlp_tile_tokens,
            "offload_checkpoints": config.offload_checkpoints,
        }
        if config.checkpoint is not None:
            return cls(**_sizes_of_checkpoint(Path(config.checkpoint) / "config.json"), **shared)
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.resolved_head_dim,
            # 256 bytes and a handful of special tokens: the built-in tokenizer.
            vocab_size=config.vocab_size or vocab_size or 260,
            tie_word_embeddings=config.tie_word_embeddings,
            **shared,
        )

    @property
    def forwards(self) -> int:
        """How often a step computes a layer's matrix products forward."""
        return 2 if self.gradient_checkpointing else 1

    @property
    def attention_forwards(self) -> int:
        """How often a step computes attention forward."""
        return 1 if self.keep_attention else self.forwards

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with: layers and the output projection."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embedding = 0 if self.tie_word_embeddings else self.hidden_size * self.vocab_size
        return self.matrix_parameters + norms + embedding


def _sizes_of_checkpoint(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        heads = data["num_attention_heads"]
        return {
            "hidden_size": data["hidden_size"],
            "intermediate_size": data["intermediate_size"],
            "num_layers": data["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": data.get("num_key_value_heads") or heads,
            "head_dim": data.get("head_dim") or data["hidden_size"] // heads,
            "vocab_size": data["vocab_size"],
            "tie_word_embeddings": bool(data.get("tie_word_embeddings", False)),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"model.checkpoint: cannot read the sizes from {path} "
            f"({type(error).__name__}: {error}); give a folder with a transformers config.json"
        ) from None
