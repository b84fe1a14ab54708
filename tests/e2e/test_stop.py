"""A run that is told to stop loses nothing, and says so by its exit code."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.e2e.command import losses, run, small_config, start, wait_for_steps

#: Four launches, one after another.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_stop_signals_to_the_launcher_end_in_a_checkpoint_and_exit_code_75(tmp_path: Path) -> None:
    config = small_config(tmp_path, "cluster: auto\n")
    command = (
        "train", "--cfg", config, "--nproc-per-node", "2", "--resume", "auto",
        "--set", "planner.max_tokens_per_device=256", "--set", "run.steps=20",
    )  # fmt: skip
    done = run(*command, "--set", f"run.dir={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr[-3000:]
    for number, steps in ((signal.SIGTERM, 3), (signal.SIGUSR1, 9)):
        process = start(*command)
        wait_for_steps(process, tmp_path / "run", steps)
        process.send_signal(number)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 75, err[-3000:]
        assert f"stopped by {number.name}" in err
        assert "Traceback" not in err
        before = losses(tmp_path / "run")
        assert steps <= len(before) < 20
        newest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
        assert newest == f"step-{len(before):06d}"
    last = run(*command)
    assert last.returncode == 0, last.stderr[-3000:]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
