"""Checkpoints: bitwise on the same ranks, and equal on other ranks and other ZeRO stages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_attn.config import Config, ModelConfig, OptimizerConfig
from dist_attn.errors import CheckpointError
from dist_attn.integrations.deepspeed_engine import DeepSpeedEngine
from dist_attn.training.checkpoint import load_checkpoint, save_checkpoint
from dist_attn.training.checkpoint_files import TrainState, find_checkpoint, read_state
from dist_attn.training.runtime import Runtime
from tests.ranks import run_ranks


class Toy(nn.Module):
    """Odd sizes, so that partitions end inside parameters and need padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().sum()


def runtime_here() -> Runtime:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Runtime(rank, size, rank, size, torch.device("cpu"))


def engine_of(stage: int, seed: int, dtype: str = "fp32") -> DeepSpeedEngine:
    torch.manual_seed(seed)
    config = Config(
        engine={"zero_stage": stage, "bucket_elements": 64},
        optimizer=OptimizerConfig(lr=0.01, eps=1e-4, gradient_clipping=1.0),
        model=ModelConfig(dtype=dtype),
    )
    model = Toy().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    return DeepSpeedEngine(model, config, torch.device("cpu"))


def train(engine: DeepSpeedEngine, steps: range, dtype: torch.dtype = torch.float32) -> None:
    """The same global batch of 12 rows whatever the number of ranks, two micro-batches each."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        rows = torch.randn(12, 7, generator=torch.Generator().manual_seed(step)).to(dtype)
        mine = rows[rank::size]
        half = len(mine) // 2
        for index, part in enumerate((mine[:half], mine[half:])):
            engine.backward(engine.forward(x=part), 12, last=index == 1)
        engine.step(lr=0.01)


def whole_state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Every parameter's state put together from the fragments of all ranks."""
    result: dict[str, Tensor] = {}
    mine = [(f.name, f.shape, f.start, f.tensors) for f in engine.fragments() if f.owned]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, shape, start, tensors in (f for rank in everyone for f in rank):
        for key, tensor in tensors.items():
            size = torch.Size(shape).numel()
            whole = result.setdefault(f"{name}/{key}", torch.full((size,), float("nan")))
            whole[start : start + tensor.numel()] = tensor
    return result


def write_and_go_on(folder: str, stage: int, dtype: str) -> tuple[dict[str, Tensor], float]:
    engine = engine_of(stage, seed=1, dtype=dtype)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    train(engine, range(3), torch_dtype)
    state = TrainState(step=3, epoch=0, offset=36, tokens=36, identity={"a": [1, 2]})
    save_checkpoint(Path(folder), engine, state, runtime_here(), keep=2)
    drawn = float(torch.rand(()) + random.random() + np.random.random())  # noqa: NPY002
    train(engine, range(3, 6), torch_dtype)
    return whole_state(engine), drawn


def resume_and_go_on(folder: str, stage: int, dtype: str) -> tuple[dict[str, Tensor], float]:
    engine = engine_of(stage, seed=2, dtype=dtype)
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    path = find_checkpoint(Path(folder), "latest")
    assert read_state(path).offset == 36
    load_checkpoint(path, engine, runtime_here())
    drawn = float(torch.rand(()) + random.random() + np.random.random())  # noqa: NPY002
    train(engine, range(3, 6), torch_dtype)
    return whole_state(engine), drawn


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (2, "bf16"),
        *(pytest.param(s, "bf16", marks=pytest.mark.slow) for s in (1, 3)),
    ],
)
def test_resumes_bit_for_bit(tmp_path: Path, stage: int, dtype: str) -> None:
    expected = run_ranks(write_and_go_on, 2, str(tmp_path), stage, dtype)
    resumed = run_ranks(resume_and_go_on, 2, str(tmp_path), stage, dtype)
    for rank in range(2):
        assert resumed[rank][1] == expected[rank][1]
        for key, tensor in expected[rank][0].items():
            assert torch.isfinite(tensor).all(), key
            assert torch.equal(tensor, resumed[rank][0][key]), key


@pytest.mark.parametrize(
    ("stages", "sizes"), [((2, 2), (2, 3)), ((3, 0), (3, 2)), ((0, 3), (2, 3)), ((1, 3), (3, 1))]
)
def test_other_ranks_and_stages(
    tmp_path: Path, stages: tuple[int, int], sizes: tuple[int, int]
) -> None:
    expected = run_ranks(write_and_go_on, sizes[0], str(tmp_path), stages[0], "fp32")[0][0]
    resumed = run_ranks(resume_and_go_on, sizes[1], str(tmp_path), stages[1], "fp32")[0][0]
    for key, tensor in expected.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-4, atol=1e-6)
    # The control: three more steps move the weights far more than that.
    start = run_ranks(state_at_the_checkpoint, 1, str(tmp_path))[0]
    moved = max((start[k] - expected[k]).abs().max().item() for k in start if "param" in k)
    assert moved > 1e-2


def state_at_the_checkpoint(folder: str) -> dict[str, Tensor]:
    engine = engine_of(1, seed=2)
    load_checkpoint(find_checkpoint(Path(folder), "latest"), engine, runtime_here())
    return whole_state(engine)


def damage_and_load(folder: str, kind: str) -> tuple[str, bool]:
    path = find_checkpoint(Path(folder), "latest")
    if dist.get_rank() == 0:
        file = sorted(path.glob("*.safetensors"))[-1]
        if kind == "truncate":
            file.write_bytes(file.read_bytes()[:-100])
        elif kind == "alter":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        elif kind == "remove":
            file.unlink()
        elif kind == "manifest":
            (path / "manifest.json").write_text('{"version": 1, "sta')
        elif kind == "altered manifest":
            text = (path / "manifest.json").read_text()
            (path / "manifest.json").write_text(text.replace('"offset": 36', '"offset": 37'))
        elif kind == "version":
            manifest = json.loads((path / "manifest.json").read_text()) | {"version": 99}
            (path / "manifest.json").write_text(json.dumps(manifest))
    dist.barrier()
    engine = engine_of(2, seed=2)
    before = whole_state(engine)
    try:
        load_checkpoint(path, engine, runtime_here())
    except CheckpointError as error:
        after = whole_state(engine)
        return str(error), all(torch.equal(before[k], after[k]) for k in before)
    return "loaded", False


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncate", "bytes"),
        ("alter", "sha256"),
        ("remove", "is missing"),
        ("manifest", "cannot be read"),
        ("altered manifest", "sha256"),
        ("version", "version 99"),
    ],
)
def test_damage_is_refused_on_every_rank(tmp_path: Path, kind: str, says: str) -> None:
    run_ranks(write_and_go_on, 2, str(tmp_path), 2, "fp32")
    for text, unchanged in run_ranks(damage_and_load, 2, str(tmp_path), kind):
        assert says in text
        assert "step-000003" in text
        assert unchanged


def write_where_nobody_may(folder: str) -> str:
    engine = engine_of(2, seed=1)
    state = TrainState(step=4, epoch=0, offset=0, tokens=0, identity={})
    blocked = Path(folder) / "file"
    if dist.get_rank() == 0:
        blocked.write_text("not a folder")
    dist.barrier()
    try:
        save_checkpoint(blocked, engine, state, runtime_here(), keep=1)
    except CheckpointError as error:
        return str(error)
    return "written"


def test_a_write_that_fails_is_told_on_every_rank(tmp_path: Path) -> None:
    for text in run_ranks(write_where_nobody_may, 2, str(tmp_path)):
        assert "cannot write checkpoint" in text
    assert (tmp_path / "file").read_text() == "not a folder"


def write_four(folder: str) -> list[str]:
    engine = engine_of(1, seed=1)
    for step in (1, 2, 3, 4):
        state = TrainState(step=step, epoch=0, offset=0, tokens=0, identity={})
        save_checkpoint(Path(folder), engine, state, runtime_here(), keep=2)
    return sorted(p.name for p in Path(folder).iterdir())


def test_keeps_the_newest(tmp_path: Path) -> None:
    names = run_ranks(write_four, 2, str(tmp_path))[0]
    assert names == ["latest", "step-000003", "step-000004"]
    assert (tmp_path / "latest").read_text() == "step-000004\n"
