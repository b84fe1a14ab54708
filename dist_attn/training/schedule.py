"""The learning rate of each step."""

from __future__ import annotations

import math

from dist_attn.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to `config.lr`, then its decay to `config.min_lr_ratio` of it.

    Args:
        step: the step about to be done, from 0.
        num_steps: steps of the whole run; the decay ends there.
        config: peak, warm-up and form of the decay.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = max(1, num_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / left)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    if config.schedule == "constant":
        return config.lr
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape)
