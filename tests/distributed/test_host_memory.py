"""Optimizer state and parameters on the host: the same training, and checkpoints that go across."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import Config, ModelConfig, OptimizerConfig
from dist_attn.integrations.deepspeed_engine import DeepSpeedEngine
from tests.distributed.test_checkpoint import Toy
from tests.distributed.test_refusals import attempt
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

PLACES = {
    "none": "{zero_stage: 2}",
    "one": "{zero_stage: 1, offload_optimizer: true}",
    "two": "{zero_stage: 2, offload_optimizer: true}",
    "three": "{zero_stage: 3, offload_optimizer: true}",
    "all": "{zero_stage: 3, offload_optimizer: true, offload_parameters: true}",
}


def run(config: Path, folder: Path, place: str, resume: str | None = None) -> None:
    more = [f"run.dir={folder}", "run.steps=6", "checkpoint.every_steps=3", f"engine={place}"]
    done = run_ranks(attempt, 2, str(config), more, resume, timeout_s=100)
    assert set(done) == {"done"}, done[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    run(small_config(folder), folder / "none", PLACES["none"])
    return folder


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=pytest.mark.slow) for p in ("all", "one", "two", "three")],
)
def test_learns_alike_and_resumes(plain: Path, tmp_path: Path, place: str) -> None:
    config, expected = plain / "small.yaml", losses(plain / "none")
    folder = tmp_path / place
    run(config, folder, PLACES[place])
    assert losses(folder) == pytest.approx(expected, abs=2e-5)
    assert expected[-1] < expected[0] - 0.1
    again = shutil.copytree(folder, tmp_path / "again")
    run(config, again, PLACES[place], resume="step-000003")
    assert losses(again) == losses(folder)
    other = shutil.copytree(plain / "none", tmp_path / "other")
    run(config, other, PLACES[place], resume="step-000003")
    assert losses(other) == pytest.approx(expected, abs=2e-5)


def where(stage: int) -> tuple[bool, bool]:
    """Whether DeepSpeed took the optimizer's state and the parameters as offloaded."""
    assert dist.get_world_size() == 2
    engine = {"zero_stage": stage, "bucket_elements": 64, "offload_optimizer": True,
              "offload_parameters": stage == 3}  # fmt: skip
    config = Config(engine=engine, optimizer=OptimizerConfig(), model=ModelConfig(dtype="fp32"))
    found = DeepSpeedEngine(Toy(), config, torch.device("cpu"))
    zero = found._engine.optimizer
    result = bool(found._engine.zero_cpu_offload()), bool(getattr(zero, "offload_param", False))
    found.close()
    return result


def test_deepspeed_is_told() -> None:
    assert run_ranks(where, 2, 2)[0] == (True, False)
    assert run_ranks(where, 2, 3)[0] == (True, True)


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "needs zero_stage 1, 2 or 3, got 0"),
        ({"zero_stage": 2, "offload_parameters": True}, "needs zero_stage 3, got 2"),
        ({"name": "megatron", "offload_optimizer": True}, "are deepspeed's"),
    ],
)
def test_what_goes_with_what(engine: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config(engine=engine)
