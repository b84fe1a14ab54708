"""The Megatron engine on a GPU: NCCL, Megatron's distributed optimizer, whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_attn.config import load_config
from dist_attn.training.loop import run_training
from dist_attn.training.runtime import Runtime
from tests.e2e.command import losses, run, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Float32, so that the engines differ by rounding alone.
COMMON = ("model.dtype=fp32", "planner.max_tokens_per_device=null", "attention.deterministic=true")
MEGATRON = "engine={name: megatron}"


def train(
    runtime: Runtime, config: Path, folder: Path, *overrides: str, resume: str | None = None
) -> None:
    settings = [*COMMON, *overrides, f"run.dir={folder}", "logging.progress_bar=false"]
    run_training(load_config(config, settings).on("cuda"), resume, runtime)


def farthest(a: Path, b: Path) -> float:
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


def test_the_losses_are_those_of_the_deepspeed_loop(alone: Runtime, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    train(alone, config, tmp_path / "deepspeed")
    train(alone, config, tmp_path / "megatron", MEGATRON)
    assert farthest(tmp_path / "deepspeed", tmp_path / "megatron") < 1e-3
    whole = losses(tmp_path / "megatron")
    assert whole[0] - whole[-1] > 0.5
    # The control: another learning rate is far outside.
    train(alone, config, tmp_path / "other", MEGATRON, "optimizer.lr=0.012")
    assert farthest(tmp_path / "other", tmp_path / "megatron") > 1e-2


def test_resuming_goes_on_to_the_bit(alone: Runtime, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    train(alone, config, tmp_path / "run", MEGATRON)
    whole = losses(tmp_path / "run")
    train(alone, config, tmp_path / "run", MEGATRON, resume="step-000008")
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize(
    "saving",
    [
        "{gradient_checkpointing: true, offload_checkpoints: true}",
        "{mlp_tile_tokens: 60, loss: torch}",
    ],
)
def test_saving_memory_changes_nothing(alone: Runtime, tmp_path: Path, saving: str) -> None:
    config = small_config(tmp_path)
    sizes = "hidden_size: 32, intermediate_size: 64, dtype: fp32"
    train(alone, config, tmp_path / "plain", MEGATRON)
    train(alone, config, tmp_path / "saving", MEGATRON, f"model={{{sizes}, {saving[1:]}")
    assert farthest(tmp_path / "saving", tmp_path / "plain") < 1e-4


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("degree", [1, 2])
def test_two_devices_compute_what_one_does(tmp_path: Path, degree: int) -> None:
    config = small_config(tmp_path)
    engine = f"engine={{name: megatron, tensor_parallel_degree: {degree}}}"
    cases = {1: [MEGATRON], 2: [engine, "planner.max_tokens_per_device=512"]}
    for num_ranks, overrides in cases.items():
        settings = [part for o in (*COMMON, *overrides) for part in ("--set", o)]
        done = run(
            "train", "--cfg", config, "--nproc-per-node", str(num_ranks),
            "--set", f"run.dir={tmp_path / str(num_ranks)}", *settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert farthest(tmp_path / "1", tmp_path / "2") < 1e-3
