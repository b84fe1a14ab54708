"""The torch optimizers of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dist_attn.config import OptimizerConfig


def make_optimizer(
    decayed: Iterable[Tensor], others: Iterable[Tensor], config: OptimizerConfig, device_type: str
) -> torch.optim.Optimizer:
    """AdamW or SGD; matrices are decayed, vectors (norms, biases) are not."""
    groups: list[dict[str, Any]] = [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=device_type == "cuda",
    )


def state_keys(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the optimizer's state per element."""
    return ("exp_avg", "exp_avg_sq") if config.name == "adamw" else ()
