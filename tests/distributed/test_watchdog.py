"""A rank that stops moving ends the run in a set time and is named; a working run is left alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.training.stop import StopRequest
from dist_attn.training.watchdog import Beat, Watchdog, describe
from tests.ranks import run_ranks, run_ranks_to_the_end

NODES = ("n1", "n1", "n2")


def shared_store() -> dist.Store:
    wait = timedelta(seconds=20)
    if dist.get_rank() == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
        dist.broadcast_object_list([store.port])
        return store
    box = [0]
    dist.broadcast_object_list(box)
    return dist.TCPStore("127.0.0.1", box[0], wait_for_workers=False, timeout=wait)


def steps_until_a_fault(folder: str, rank_at_fault: int, fault: str) -> None:
    rank = dist.get_rank()

    def report(text: str) -> None:
        Path(folder, f"rank{rank}").write_text(text)
        os._exit(69)

    with Watchdog(shared_store(), rank, NODES, 1.5, report) as watchdog:
        for step in range(1000):
            watchdog.mark(step, "forward")
            faulty = step == 3 and rank == rank_at_fault
            watchdog.mark(step, "the fault" if faulty else "loss")
            if faulty:
                time.sleep(0.5)
                if fault == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(60)
            watchdog.mark(step, "backward")
            dist.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    begun = time.monotonic()
    ends = run_ranks_to_the_end(steps_until_a_fault, 3, str(tmp_path), 2, "stop", timeout_s=9)
    assert time.monotonic() - begun < 60
    # The one that was stopped is ended by the helper, as a launcher would.
    assert [e.exitcode for e in ends] == [69, 69, -9]
    for rank in (0, 1):
        text = (tmp_path / f"rank{rank}").read_text()
        assert f"rank {rank} waits in backward of step 3" in text
        assert "rank 2 on n2 gives no sign of life, last seen in the fault of step 3" in text


def test_a_rank_that_hangs_is_named_by_all(tmp_path: Path) -> None:
    ends = run_ranks_to_the_end(steps_until_a_fault, 3, str(tmp_path), 1, "hang", timeout_s=9)
    assert [e.exitcode for e in ends] == [69, 69, 69]
    for rank in range(3):
        text = (tmp_path / f"rank{rank}").read_text()
        assert "every rank is alive" in text
        assert "rank 1 on n1, in the fault of step 3" in text


def slow_but_moving() -> list[str]:
    reports: list[str] = []
    with Watchdog(shared_store(), dist.get_rank(), NODES, 0.5, reports.append) as watchdog:
        for step in range(6):
            watchdog.mark(step, "forward")
            time.sleep(0.2)
    return reports


def test_a_run_that_moves_is_left_alone() -> None:
    assert run_ranks(slow_but_moving, 3) == [[], [], []]


def told_to_stop(log: str) -> bool:
    """Rank 1 gets SIGTERM while it stands in a collective that rank 0 comes to late."""
    rank = dist.get_rank()
    with Path(f"{log}{rank}").open("w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", file)
        with (
            StopRequest() as stop,
            Watchdog(shared_store(), rank, ("n1", "n2"), 10.0, None, 0.2) as watchdog,
        ):
            watchdog.mark(7, "backward")
            if rank == 0:
                time.sleep(2.5)
            else:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            dist.all_reduce(torch.ones(1))
            return stop.signal_name == "SIGTERM"


@pytest.mark.slow
def test_a_rank_that_cannot_stop_shows_its_stacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_ranks(told_to_stop, 2, str(log), fresh=True) == [False, True]
    text = Path(f"{log}1").read_text()
    assert "stacks of this rank" in text
    assert "in told_to_stop" in text
    assert Path(f"{log}0").read_text() == ""


def test_the_rank_that_is_behind_is_named() -> None:
    waits, moved = Beat(9, 22, 5, "planning", 30.0), Beat(10, 22, 5, "planning", 31.0)
    behind = [Beat(n, 21, 4, "the optimizer", 20.0 + n) for n in (9, 10)]
    text = describe([waits, waits, behind[0]], [moved, moved, behind[1]], NODES)
    assert "behind the others: rank 2 on n2, in the optimizer of step 4 for 30 s" in text
    text = describe([waits, None, waits], [moved, None, moved], NODES)
    assert text == "rank 1 on n1 gives no sign of life, last seen before the run began"
    text = describe([waits] * 3, [moved] * 3, NODES)
    assert "in the same place, in planning of step 5 for 31 s" in text
