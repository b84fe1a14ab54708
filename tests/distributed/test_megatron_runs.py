"""Whole runs by the Megatron engine: the DeepSpeed loop's losses, resuming, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.test_refusals import attempt, refused
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

STEPS = 50
#: Two planner ranks must hold the longest document, which four do otherwise.
WIDER = "planner.max_tokens_per_device=320"


def run(
    config: Path, folder: Path, num_ranks: int, *overrides: str, resume: str | None = None
) -> None:
    """A run of the main job in `folder`; every rank must come to its end."""
    done = run_ranks(
        attempt, num_ranks, str(config), [f"run.dir={folder}", *overrides], resume, timeout_s=100
    )
    assert set(done) == {"done"}, done[0]


def megatron(degree: int) -> str:
    return f"engine={{name: megatron, tensor_parallel_degree: {degree}}}"


def farthest(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run with a learning rate at which it learns."""
    return small_config(tmp_path_factory.mktemp("megatron"))


@pytest.fixture(scope="module")
def deepspeed(config: Path) -> Path:
    folder = config.parent / "deepspeed"
    run(config, folder, 4, f"run.steps={STEPS}", "checkpoint.every_steps=45")
    return folder


def test_the_losses_are_those_of_the_deepspeed_loop(config: Path) -> None:
    """Same weights, data and plans, on two ranks."""
    theirs, ours = config.parent / "two-deepspeed", config.parent / "two-megatron"
    steps = f"run.steps={STEPS}"
    run(config, theirs, 2, WIDER, steps)
    run(config, ours, 2, WIDER, steps, megatron(1), f"planner.plans_dir={theirs / 'plans'}")
    compare(losses(theirs), losses(ours))


@pytest.mark.slow
@pytest.mark.parametrize("degree", [1, 2])
def test_the_losses_on_four_ranks(config: Path, deepspeed: Path, degree: int) -> None:
    folder = config.parent / f"megatron-{degree}"
    # With tensor parallelism the planner has half the ranks: the plans are others.
    plans = f"planner.plans_dir={deepspeed / 'plans'}" if degree == 1 else WIDER
    run(config, folder, 4, f"run.steps={STEPS}", megatron(degree), plans)
    compare(losses(deepspeed), losses(folder))


def compare(expected: list[float], found: list[float]) -> None:
    """Equal curves of runs that learn."""
    assert len(found) == STEPS
    assert farthest(found, expected) <= 1e-3
    # The controls: it learned, and a curve shifted by a step is seen.
    assert expected[-1] < 0.7 * expected[0]
    assert farthest(found[1:], expected[:-1]) > 0.05


@pytest.mark.slow
def test_resumes_bit_for_bit_and_with_another_degree_or_engine(
    config: Path, deepspeed: Path, tmp_path: Path
) -> None:
    folder = config.parent / "whole"
    run(config, folder, 4, megatron(2), WIDER)
    whole = losses(folder)

    same = shutil.copytree(folder, tmp_path / "same")
    run(config, same, 4, megatron(2), WIDER, resume="step-000004")
    assert losses(same) == whole

    alone = shutil.copytree(folder, tmp_path / "alone")
    run(config, alone, 4, megatron(1), resume="step-000004")
    assert losses(alone) != whole
    assert farthest(losses(alone), whole) < 1e-4

    other = shutil.copytree(folder, tmp_path / "other")
    run(config, other, 2, WIDER, resume="step-000004")
    assert farthest(losses(other), whole) < 1e-4

    back = shutil.copytree(deepspeed, tmp_path / "back")
    run(config, back, 4, megatron(2), WIDER, f"run.steps={STEPS}", resume="step-000045")
    assert losses(back)[:45] == losses(deepspeed)[:45]
    assert farthest(losses(back), losses(deepspeed)) < 1e-4


@pytest.mark.slow
def test_masks_of_layers_are_carried_out(config: Path, tmp_path: Path) -> None:
    masks = "attention.masks=[{layers: [1], kind: window, window_tokens: 5}]"
    run(config, tmp_path / "deepspeed", 4, "run.steps=6", masks)
    run(config, tmp_path / "megatron", 4, "run.steps=6", masks, megatron(2), WIDER)
    run(config, tmp_path / "causal", 4, "run.steps=6", megatron(1))
    masked = losses(tmp_path / "megatron")
    assert farthest(masked, losses(tmp_path / "deepspeed")) < 1e-4
    assert farthest(masked, losses(tmp_path / "causal")) > 1e-3


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    text = refused(
        config, [megatron(2), "cluster={nodes: [{count: 2, devices_per_node: 1, device: cpu}]}"]
    )
    assert "ranks 0 to 1 are not 2 equal devices of one node" in text
    text = refused(config, [megatron(4), "model.num_heads=8", "model.num_kv_heads=4"])
    assert "ranks 0 to 3 are not 4 equal devices" in text
    assert not (tmp_path / "run").exists()
