"""Ranks killed at random moments, a disk that is full, and long runs."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import UserError
from dist_attn.groups import GroupPool
from dist_attn.training.loop import run_training
from dist_attn.training.run_folder import read_metrics
from dist_attn.training.runtime import Runtime
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks, run_ranks_to_the_end

OVERRIDES = [
    "planner.max_tokens_per_device=256", "logging.tensorboard=false", "checkpoint.every_steps=3",
]  # fmt: skip


def training(config: str, overrides: list[str], resume: str | None = None) -> str:
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    try:
        run_training(settings, resume, Runtime(rank, size, rank, size, torch.device("cpu")))
    except UserError as error:
        return str(error)
    return "done"


def seconds_of_training(config: str, overrides: list[str]) -> float:
    begun = time.monotonic()
    assert training(config, overrides) == "done"
    return time.monotonic() - begun


def training_with_a_death(config: str, overrides: list[str], rank: int, after_s: float) -> str:
    """Train; one rank dies at a moment that no line of the program chose."""
    if dist.get_rank() == rank:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return training(config, overrides, "auto")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_random_moments_never_change_the_curve(tmp_path: Path) -> None:
    config = str(small_config(tmp_path))
    whole = [*OVERRIDES, f"run.dir={tmp_path / 'whole'}"]
    duration = min(e.value for e in run_ranks_to_the_end(seconds_of_training, 3, config, whole))
    curve = losses(tmp_path / "whole")
    moments = random.Random(7)
    interrupted = 0
    for trial in range(20):
        here = [*OVERRIDES, f"run.dir={tmp_path / f'run{trial}'}"]
        rank, after_s = moments.randrange(3), moments.uniform(0, duration)
        ends = run_ranks_to_the_end(training_with_a_death, 3, config, here, rank, after_s)
        interrupted += any(e.killed for e in ends)
        # Survivors are told by their connections; none of them waits for the end of the test.
        assert all(e.value or e.error or e.exitcode == -signal.SIGKILL for e in ends)
        assert run_ranks(training, 3, config, here, "auto") == ["done"] * 3
        assert losses(tmp_path / f"run{trial}") == curve, (trial, rank, after_s)
    assert interrupted >= 10


def training_on_a_small_disk(config: str, overrides: list[str], limited_rank: int) -> str:
    """Train where one rank cannot write files beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return training(config, overrides, "latest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limited_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before(
    tmp_path: Path, limited_rank: int
) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    # So that the first three steps of nine are three steps.
    short, long = (
        [*OVERRIDES, "optimizer.schedule=constant", f"run.steps={steps}"] for steps in (3, 9)
    )
    assert run_ranks(training, 2, config, short) == ["done"] * 2
    ends = run_ranks(training_on_a_small_disk, 2, config, long, limited_rank)
    assert ends[0] == ends[1]
    assert "cannot write checkpoint" in ends[0]
    assert "earlier checkpoints are untouched" in ends[0]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000003"
    # What was half written does not go on filling the disk.
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-000003"]
    assert len(read_metrics(run / "metrics.jsonl")) == 6
    assert run_ranks(training, 2, config, long, "latest") == ["done"] * 2
    assert run_ranks(training, 2, config, [*long, f"run.dir={tmp_path / 'whole'}"]) == ["done"] * 2
    assert losses(run) == losses(tmp_path / "whole")


def training_and_counting(config: str, overrides: list[str], every: int) -> list[tuple[int, ...]]:
    """Train; memory in KiB, open files, threads and process groups every so many steps."""
    counts: list[tuple[int, ...]] = []
    process = psutil.Process()
    ensure = GroupPool.ensure

    def counted(self: GroupPool, sets: object) -> None:
        ensure(self, sets)  # type: ignore[arg-type]
        calls[0] += 1
        if calls[0] % every == 0:
            kib = process.memory_info().rss // 1024
            counts.append((kib, process.num_fds(), process.num_threads(), len(self)))

    calls = [0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupPool, "ensure", counted)
        assert training(config, overrides) == "done"
    return counts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_steps_grow_nothing(tmp_path: Path) -> None:
    config = str(small_config(tmp_path))
    long = ["logging.tensorboard=true", "run.steps=2000", "checkpoint.every_steps=100"]
    ranks = run_ranks(training_and_counting, 4, config, long, 100, fresh=True, timeout_s=1500)
    text = "KiB, open files, threads, groups; rank by rank\n" + "\n".join(map(str, ranks))
    (tmp_path / "counts.txt").write_text(text)
    for counts in ranks:
        quarter = len(counts) // 4
        early, late = counts[quarter : 2 * quarter], counts[-quarter:]
        # Rank 0 climbs by some 40 MiB of pictures between two garbage collections: highs count.
        kib = [max(c[0] for c in part) for part in (early, late)]
        assert kib[1] - kib[0] < 20_000, text
        assert max(c[1] for c in late) <= max(c[1] for c in early) + 4, text
        assert max(c[2] for c in late) <= max(c[2] for c in early) + 2, text
        # Four ranks have ten groups of two and three; the pool keeps 64.
        assert max(c[3] for c in late) <= 10
