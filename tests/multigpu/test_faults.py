"""The preflight and lost ranks on one GPU per rank, where the ranks are joined by NCCL."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import psutil
import pytest
import torch

from dist_attn.planner.calibration import Calibration, Fit
from tests.e2e.command import losses, run, small_config, start, wait_for_steps

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
#: Documents of up to 512 tokens then need both ranks.
TWO_GPUS = (
    "--nproc-per-node", "2", "--set", "run.device=cuda", "--set", "model.hidden_size=64",
    "--set", "planner.max_tokens_per_device=256", "--set", "logging.tensorboard=false",
    "--set", "run.timeout_s=10", "--set", "run.steps=80", "--set", "checkpoint.every_steps=10",
)  # fmt: skip
HIT_AFTER = 25
#: Kernels on GPUs add in any order.
SAME = 5e-3


@pytest.mark.parametrize(("gb_per_s", "code"), [(100.0, 0), (5000.0, 69)])
def test_the_preflight_holds_nccl_against_a_calibration(
    tmp_path: Path, gb_per_s: float, code: int
) -> None:
    calibration = tmp_path / "calibration.yaml"
    link = Fit((1e-5, 1e-9 / gb_per_s), 0.0, 0.0)
    Calibration("h100-80gb", Fit((0.0, 1.0, 1.0), 0.0, 0.0), intra_node=link).save(calibration)
    options = ("--calibration", calibration, "--min-free-gib", "0.1")
    done = run("preflight", "--cfg", small_config(tmp_path), *TWO_GPUS, *options)
    print(done.stdout, done.stderr)  # noqa: T201  (the figures, under -s)
    assert done.returncode == code, done.stderr[-3000:]
    if code == 0:
        assert "2 ranks on 1 nodes are fit" in done.stdout + done.stderr
    else:
        assert re.search(r"rank 0 sends [\d.]+ GB/s inside the node", done.stderr)
        assert f"{calibration} promises 5000.00" in done.stderr
        assert f"bad nodes: {socket.gethostname()}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_a_lost_rank_ends_the_run_which_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    config = small_config(tmp_path)
    hit = start("train", "--cfg", config, *TWO_GPUS)
    wait_for_steps(hit, tmp_path / "run", HIT_AFTER)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(hit.pid).children()}
    ranks["1"].send_signal(number)
    whole = start("train", "--cfg", config, *TWO_GPUS, "--set", f"run.dir={tmp_path / 'whole'}")
    # torchrun's 30 s of patience with a rank that stands in a kernel, or cannot run.
    _, err = hit.communicate(timeout=70)
    print("\n".join(line for line in err.splitlines() if " rank " in f" {line}")[-3000:])  # noqa: T201
    if number == signal.SIGKILL:
        assert hit.returncode == 137, err[-3000:]
        assert re.search(r"rank 1 .* was ended by SIGKILL", err)
    else:
        assert hit.returncode == 69, err[-3000:]
        assert "rank 1 on" in err
        assert "gives no sign of life, last seen in" in err
    # Where the other rank was.
    assert re.search(r"Traceback|Current thread|Thread 0x", err)
    print(number.name, "ended as it should")  # noqa: T201
    out, whole_err = whole.communicate(timeout=70)
    assert whole.returncode == 0, out[-2000:] + whole_err[-2000:]
    before = losses(tmp_path / "run")
    assert HIT_AFTER <= len(before) < 80
    resumed = run("train", "--cfg", config, *TWO_GPUS, "--resume", timeout_s=70)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    after, curve = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert max(abs(a - b) for a, b in zip(after, curve, strict=True)) < SAME
    # The control: neighbouring steps at the beginning.
    assert max(abs(a - b) for a, b in zip(curve[1:], curve[:-1], strict=True)) > 20 * SAME
