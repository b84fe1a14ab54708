"""Ranks that do not end with the others, and stores that listen where they are told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from dist_attn.training.rendezvous import serve
from dist_attn.training.slurm import LOOPBACK
from tests.e2e.command import ROOT, environment

LAUNCHER = r"""
import os, signal, subprocess, sys, threading, time
from dist_attn.training.launcher import _end_the_last
threading.Thread(target=_end_the_last, args=(3, 0.6), daemon=True).start()
RANK = '''
import faulthandler, signal, time
faulthandler.register(signal.SIGUSR2)
print("ready", flush=True)
time.sleep(60)
'''
ranks = [
    subprocess.Popen(
        [sys.executable, "-c", RANK], stdout=subprocess.PIPE,
        env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r)},
    )
    for r in range(3)
]
for r in ranks:
    r.stdout.readline()
time.sleep(1.5)
assert all(r.poll() is None for r in ranks), "ended although nobody had left"
ranks[2].send_signal(signal.SIGSTOP)
for r in ranks[:2]:
    r.kill()
    r.wait()
print(ranks[2].wait(timeout=20))
"""


def test_a_rank_that_stays_when_others_ended_is_named_and_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(-signal.SIGKILL)
    assert "rank 2 (process" in done.stderr
    assert re.search(r"stopped\) is still there [\d.]+ s after others ended", done.stderr)
    # Its stack, although it was stopped.
    assert "Current thread" in done.stderr


def listening_at(port: int) -> set[str]:
    found = psutil.Process(os.getpid()).net_connections("tcp")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}


def test_a_store_listens_at_its_address_alone() -> None:
    store = serve(LOOPBACK, 0, 5.0)
    assert listening_at(store.port) == {LOOPBACK}
    other = dist.TCPStore(LOOPBACK, store.port, timeout=timedelta(seconds=5))
    other.set("key", "value")
    assert store.get("key") == b"value"
    # The control: torch's own listens everywhere.
    plain = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    assert listening_at(plain.port) != {LOOPBACK}


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(LOOPBACK, taken.getsockname()[1], 5.0)
