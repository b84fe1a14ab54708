"""A rank that computes slowly is named, and those that wait for it are not."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_attn.comm.exchange import _MessageExchange
from dist_attn.config import load_config
from dist_attn.training import slow_ranks
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner
from tests.e2e.command import small_config
from tests.ranks import run_ranks

#: Every group has all three ranks, so that both others wait for the slow one in each layer.
OVERRIDES = [
    "planner={mode: static, static_degree: 3, max_tokens_per_device: 400}", "run.steps=6",
    "attention.strategies=[ring]", "run.slow_rank_factor=2", "run.slow_rank_steps=3",
    "logging.tensorboard=true",
]  # fmt: skip

#: Far more than an exchange takes where others use the processors too.
LATE_S = 0.05


def training(config: str, overrides: list[str], slow: int | None) -> tuple[list[str], float]:
    """Train with one rank that computes longer; the warnings, and how long this rank waited."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    said: list[str] = []
    start, forward = _MessageExchange.start, StepRunner._forward
    waited = [0.0]

    def late(self: _MessageExchange) -> None:
        time.sleep(LATE_S if rank == slow else 0.0)
        start(self)

    def counted(self: StepRunner, *args: object) -> torch.Tensor:
        ledger = args[1].ledger  # type: ignore[attr-defined]
        before = sum(ledger.waits.seconds())
        loss = forward(self, *args)  # type: ignore[arg-type]
        waited[0] += sum(ledger.waits.seconds()) - before
        return loss

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener()
    slow_ranks.logger.addHandler(listener)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_MessageExchange, "start", late)
            patch.setattr(StepRunner, "_forward", counted)
            nodes = tuple(f"n{r}" for r in range(size))
            runtime = Runtime(rank, size, rank, size, torch.device("cpu"), None, nodes)
            run_training(settings, None, runtime)
    finally:
        slow_ranks.logger.removeHandler(listener)
    return said, waited[0]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_slow_rank_is_named_and_those_that_wait_are_not(tmp_path: Path, stage: int) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    overrides = [*OVERRIDES, f"engine.zero_stage={stage}"]
    ends = run_ranks(training, 3, config, overrides, 1)
    assert [len(said) for said, _ in ends] == [1, 0, 0]
    assert "rank 1 on n1 is slow" in ends[0][0][0]
    # The others' time went into waiting for it.
    assert min(ends[0][1], ends[2][1]) > 2 * ends[1][1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(x["slowest_rank"] == 1 and x["slowest_rank_ratio"] > 2 for x in lines[2:])
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    shown = [e.value for e in board.Scalars("balance/slowest_rank_ratio")]
    assert shown == pytest.approx([x["slowest_rank_ratio"] for x in lines], rel=1e-6)


@pytest.mark.slow
def test_equally_quick_ranks_are_left_alone(tmp_path: Path) -> None:
    ends = run_ranks(training, 3, str(small_config(tmp_path)), OVERRIDES, None)
    assert [said for said, _ in ends] == [[], [], []]
