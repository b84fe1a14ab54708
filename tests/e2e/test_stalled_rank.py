"""A rank that the system stopped: the run ends in a set time and names it, and goes on later."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import losses, run, small_config, start, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stopped", [0, 2])
def test_sigstop_of_a_rank_ends_the_run_and_names_it(tmp_path: Path, stopped: int) -> None:
    config = small_config(tmp_path)
    # Longer than the imports of four ranks take on a busy machine.
    short = ("--set", "run.timeout_s=30")
    process = start("train", "--cfg", config, *short)
    wait_for_steps(process, tmp_path / "run", 5)
    ranks = {
        child.environ().get("RANK"): child
        for child in psutil.Process(process.pid).children(recursive=False)
    }
    ranks[str(stopped)].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    _, err = process.communicate(timeout=180)
    # The limit, 25 s to tell who is at fault, and a few more until it is ended.
    assert time.monotonic() - begun < 120
    assert process.returncode == 69, err[-3000:]
    assert f"rank {stopped} on" in err
    assert "gives no sign of life, last seen in" in err
    # The stacks of every rank: three show theirs, and the launcher has the stopped one show its.
    for rank in {"0", "1", "2", "3"} - {str(stopped)}:
        assert f"[rank {rank}] stacks of this rank" in err
    assert f"rank {stopped} (process {ranks[str(stopped)].pid}, stopped) is still there" in err
    assert err.count("most recent call first") > 4
    before = losses(tmp_path / "run")

    again = run("train", "--cfg", config, *short, "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    after = losses(tmp_path / "run")
    assert len(after) == 12
    assert after[: len(before)] == before
