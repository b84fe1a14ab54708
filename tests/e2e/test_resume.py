"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import losses, run, small_config, start, wait_for_steps
from tests.faults import training
from tests.ranks import run_ranks

WIDER = "planner.max_tokens_per_device=256"
STEPS = 16
TWO_RANKS = ("--nproc-per-node", "2", "--set", WIDER, "--set", f"run.steps={STEPS}")
#: Four launches, one after another.
pytestmark = pytest.mark.timeout(900)


def killed_in_mid_step(config: Path, run_folder: Path, after_steps: int) -> tuple[int, str]:
    """Start a run, SIGKILL one rank some time after a step, and return how the launcher ended."""
    process = start("train", "--cfg", config, *TWO_RANKS)
    wait_for_steps(process, run_folder, 1)
    assert listens_at(process.pid) == {"127.0.0.1"}
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=False)
        if child.environ().get("RANK") == "1"
    ]
    assert len(ranks) == 1
    wait_for_steps(process, run_folder, after_steps)
    ranks[0].kill()
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def listens_at(pid: int) -> set[str]:
    """Addresses at which a launcher, its ranks and what they started accept connections."""
    parent = psutil.Process(pid)
    return {
        connection.laddr.ip
        for process in (parent, *parent.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_sigkill_and_resume_give_the_uninterrupted_curve(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    whole = tmp_path / "whole"
    # What nothing happens to needs no command of its own.
    alone = [WIDER, f"run.steps={STEPS}", f"run.dir={whole}"]
    assert run_ranks(training, 2, str(config), alone, timeout_s=120) == ["done"] * 2

    code, err = killed_in_mid_step(config, tmp_path / "run", after_steps=6)
    assert code == 137
    assert re.search(r"rank 1 .* was ended by SIGKILL", err)
    # The others say where they were, with their stacks.
    assert re.search(r"rank 0 fails in .* of step \d+: .*; last seen were rank 1 on", err)
    assert "Traceback" in err
    before = losses(tmp_path / "run")
    assert 6 <= len(before) < STEPS

    logs = tmp_path / "logs"
    resumed = run("train", "--cfg", config, *TWO_RANKS, "--resume", "--log-dir", logs)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed at step" in (logs / "rank-0.log").read_text()
    assert "resumed at step" not in resumed.stdout + (logs / "rank-1.log").read_text()
    # Bit for bit, the steps before the kill and those after.
    assert losses(tmp_path / "run") == losses(whole)
    assert losses(whole)[: len(before)] == before
    # Nobody else may write into what is read again.
    files = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert not [f for f in files if f.stat().st_mode & 0o022]

    # On another number of ranks and ZeRO stage from an older checkpoint: equal to rounding.
    other = [
        f"run.steps={STEPS}", "engine.zero_stage=3", "planner.max_tokens_per_device=200",
        "planner.degrees=all",
    ]  # fmt: skip
    three = run_ranks(training, 3, str(config), other, "step-000008", timeout_s=120)
    assert three == ["done"] * 3
    again = losses(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(again, losses(whole), strict=True)) < 1e-4
    assert again != losses(whole)
