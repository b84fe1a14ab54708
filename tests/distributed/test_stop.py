"""Stop signals and `--resume auto`, with the uninterrupted curve as the judge."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import Stopped, UserError
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from dist_attn.training.stop import StopRequest
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

OVERRIDES = ["planner.max_tokens_per_device=256"]


def training(
    config: str,
    overrides: list[str],
    resume: str | None = None,
    signals: dict[int, int] | None = None,
    after_steps: int = 0,
) -> str:
    """Train in this rank, which sends itself a signal after some steps; how it ended."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    if signals and rank in signals:
        metrics = Path(settings.run.dir) / "metrics.jsonl"
        threading.Thread(
            target=_signal_later, args=(metrics, after_steps, signals[rank]), daemon=True
        ).start()
    runtime = Runtime(rank, size, rank, size, torch.device("cpu"))
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        with StopRequest() as stop:
            run_training(settings, resume, runtime, stop)
    except (Stopped, UserError) as error:
        return str(error)
    finally:
        # These ranks live on for other tests.
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)
    return "done"


def _signal_later(metrics: Path, steps: int, number: int) -> None:
    while not metrics.is_file() or metrics.read_text().count("\n") < steps:
        time.sleep(0.005)
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(training, 2, str(small_config(folder)), OVERRIDES) == ["done"] * 2
    return losses(folder / "run")


def test_one_signalled_rank_stops_all_of_them_and_nothing_is_lost(
    tmp_path: Path, whole: list[float]
) -> None:
    config = str(small_config(tmp_path))
    ends = run_ranks(training, 2, config, OVERRIDES, "auto", {1: signal.SIGUSR1}, after_steps=2)
    stopped_at = len(losses(tmp_path / "run"))
    assert 2 <= stopped_at < 12
    assert ends == [ends[0]] * 2
    assert f"stopped by SIGUSR1 after step {stopped_at - 1}" in ends[0]
    assert f"step-{stopped_at:06d}" in ends[0]
    both = {0: signal.SIGTERM, 1: signal.SIGTERM}
    ends = run_ranks(training, 2, config, OVERRIDES, "auto", both, after_steps=stopped_at + 2)
    assert "stopped by SIGTERM" in ends[0]
    assert run_ranks(training, 2, config, OVERRIDES, "auto") == ["done"] * 2
    assert losses(tmp_path / "run") == whole


@pytest.mark.slow
def test_auto_begins_goes_on_and_leaves_a_finished_run_alone(
    tmp_path: Path, whole: list[float]
) -> None:
    config = str(small_config(tmp_path))
    run_folder = tmp_path / "run"
    late = [*OVERRIDES, "checkpoint.every_steps=0", "checkpoint.at_end=false", "run.steps=3"]
    assert run_ranks(training, 2, config, late, "auto") == ["done"] * 2
    # The folder is not empty and holds no checkpoint: the run of a job that died early.
    assert "is not empty" in run_ranks(training, 2, config, OVERRIDES)[0]
    assert "holds no checkpoint yet" in run_ranks(training, 2, config, OVERRIDES, "latest")[0]
    assert run_ranks(training, 2, config, OVERRIDES, "auto") == ["done"] * 2
    assert losses(run_folder) == whole
    before = (run_folder / "metrics.jsonl").stat().st_mtime_ns
    assert run_ranks(training, 2, config, OVERRIDES, "auto") == ["done"] * 2
    assert (run_folder / "metrics.jsonl").stat().st_mtime_ns == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("somebody's")
    text = run_ranks(training, 2, config, [*OVERRIDES, f"run.dir={other}"], "auto")[0]
    assert "is not empty" in text
