"""Train in the ranks of a test, and let something happen on the way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import NodeError, UserError
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner

OVERRIDES = [
    "planner.max_tokens_per_device=256", "checkpoint.every_steps=3",
]  # fmt: skip


def training(config: str, overrides: list[str], resume: str | None = None) -> str:
    """Train in this rank; `done`, or the text of the refusal."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    nodes = tuple(f"n{r}" for r in range(size))
    runtime = Runtime(rank, size, rank, size, torch.device("cpu"), None, nodes)
    try:
        run_training(settings, resume, runtime)
    except (UserError, NodeError) as error:
        return str(error)
    return "done"


@contextlib.contextmanager
def at_step(step: int, action: Callable[[], None], where: str = "accumulate") -> Iterator[None]:
    """Do something in this rank at a run's step, counted from 1.

    Either before all else (`accumulate`), or when its tokens have been read (`_read`).
    """
    original = getattr(StepRunner, where)
    steps = [0]

    def counted(self: StepRunner, *args: Any) -> Any:
        steps[0] += 1
        if where == "accumulate" and steps[0] == step:
            action()
        result = original(self, *args)
        if where != "accumulate" and steps[0] == step:
            action()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, where, counted)
        yield


@contextlib.contextmanager
def listening(logger: logging.Logger) -> Iterator[list[str]]:
    """What a logger says in this rank meanwhile."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)
