"""Megatron's gated MLPs, computed a tile of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from dist_attn.errors import ConfigError
from dist_attn.integrations.tiled_mlp import tiled_mlp


def tile_megatron_mlps(model: nn.Module, tile_tokens: int) -> None:
    """Let the MLPs of a Megatron model be computed in tiles; their parameters stay Megatron's.

    Not by a class in the layers' spec: Megatron's layer tells the tensor-parallel group to modules
    of its own class MLP alone.

    Raises:
        ConfigError: they have biases or another gate, or tokens are divided among tensor ranks.

    Collective: the MLPs' sums over the tensor-parallel group, each once as without tiles.
    """
    for module in model.modules():
        if isinstance(module, MLP):
            _check(module.config)
            module.forward = MethodType(_forward(tile_tokens), module)


def _forward(tile_tokens: int) -> Callable[..., tuple[Tensor, None]]:
    def forward(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        gate, up = module.linear_fc1.weight.chunk(2)
        hidden = copy_to_tensor_model_parallel_region(hidden_states, group=module.tp_group)
        part = tiled_mlp(hidden, gate, up, module.linear_fc2.weight, tile_tokens=tile_tokens)
        return reduce_from_tensor_model_parallel_region(part, group=module.tp_group), None

    return forward


def _check(config: Any) -> None:
    what = None
    if config.add_bias_linear:
        what = "has biases"
    elif not config.gated_linear_unit or config.activation_func is not F.silu:
        what = "is not gated by silu"
    elif config.sequence_parallel:
        what = "has its tokens divided among tensor ranks (sequence_parallel)"
    if what is not None:
        raise ConfigError(
            f"model.mlp_tile_tokens takes MLPs without biases that are gated by silu, with all "
            f"tokens on each tensor rank; this one {what}; leave mlp_tile_tokens out"
        )
