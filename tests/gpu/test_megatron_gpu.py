"""The Megatron engine on GPUs: NCCL, Megatron's distributed optimizer, the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.command import losses, run, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Float32, so that the engines differ by rounding alone.
COMMON = ("model.dtype=fp32", "planner.max_tokens_per_device=null", "attention.deterministic=true")


def train(config: Path, folder: Path, num_ranks: int, *overrides: str, resume: str = "") -> None:
    settings = [part for o in (*COMMON, *overrides) for part in ("--set", o)]
    going_on = ["--resume", resume] if resume else []
    done = run(
        "train", "--cfg", config, "--nproc-per-node", str(num_ranks), *going_on,
        "--set", f"run.dir={folder}", *settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def farthest(a: Path, b: Path) -> float:
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


def test_the_losses_are_those_of_the_deepspeed_loop_and_resuming_goes_on(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    megatron = "engine={name: megatron}"
    train(config, tmp_path / "deepspeed", 1)
    train(config, tmp_path / "megatron", 1, megatron)
    assert farthest(tmp_path / "deepspeed", tmp_path / "megatron") < 1e-3
    whole = losses(tmp_path / "megatron")
    assert whole[0] - whole[-1] > 0.5

    recomputed = "model.gradient_checkpointing=true"
    train(config, tmp_path / "recomputed", 1, megatron, recomputed)
    assert farthest(tmp_path / "recomputed", tmp_path / "megatron") < 1e-4

    train(config, tmp_path / "megatron", 1, megatron, resume="step-000008")
    assert losses(tmp_path / "megatron") == whole


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("degree", [1, 2])
def test_two_devices_compute_what_one_does(tmp_path: Path, degree: int) -> None:
    config = small_config(tmp_path)
    train(config, tmp_path / "one", 1, "engine={name: megatron}")
    engine = f"engine={{name: megatron, tensor_parallel_degree: {degree}}}"
    train(config, tmp_path / "two", 2, engine, "planner.max_tokens_per_device=512")
    assert farthest(tmp_path / "one", tmp_path / "two") < 1e-3
