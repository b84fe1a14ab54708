"""A loss that is not finite: the run stops or leaves the step out, and names the documents."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from dist_attn.config import load_config
from dist_attn.data import LocalBatch
from dist_attn.errors import UserError
from dist_attn.integrations import loss, megatron_loss
from dist_attn.training.loop import run_training
from dist_attn.training.run_folder import read_metrics
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner
from dist_attn_kernels.linear_cross_entropy import linear_cross_entropy
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

OVERRIDES = [
    "planner.max_tokens_per_device=256", "run.steps=6",
    "checkpoint={every_steps: 1, keep: 20}",
]  # fmt: skip


def training(
    config: str, overrides: list[str], bad_steps: list[int], resume: str | None = None
) -> str:
    """Train; in bad steps the loss of rank 1's first micro-batch is not finite."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    accumulate, forward = StepRunner.accumulate, StepRunner._forward
    at = {"step": int(resume[-6:]) - 1 if resume else -1, "micro_batch": 0}

    def counted(self: StepRunner, *args: Any) -> Any:
        at.update(step=at["step"] + 1, micro_batch=-1)
        return accumulate(self, *args)

    def poisoned(self: StepRunner, *args: Any) -> torch.Tensor:
        at["micro_batch"] += 1
        loss = forward(self, *args)
        bad = at["step"] in bad_steps and at["micro_batch"] == 0 and rank == 1
        # Infinite with finite gradients: the step must be left out all the same.
        return loss + float("inf") if bad else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "accumulate", counted)
        patch.setattr(StepRunner, "_forward", poisoned)
        try:
            run_training(settings, resume, Runtime(rank, size, rank, size, torch.device("cpu")))
        except UserError as error:
            return str(error)
    return "done"


class _BadGradient(torch.autograd.Function):
    """Passes on what it gets; the gradient of some tokens becomes NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(bad)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (bad,) = ctx.saved_tensors
        return gradient.masked_fill(bad[:, None], float("nan")), None


def training_with_a_bad_document(config: str, overrides: list[str]) -> str:
    """Train; wherever a document has a `Q`, the gradient of that token's last state is NaN."""
    rank, size = dist.get_rank(), dist.get_world_size()
    settings = load_config(config, overrides).on("cpu")
    forward, from_states = StepRunner._forward, linear_cross_entropy
    tokens = [torch.zeros(0)]

    def seen(self: StepRunner, batch: LocalBatch, *rest: Any) -> torch.Tensor:
        tokens[0] = batch.input_ids.flatten()
        return forward(self, batch, *rest)

    def poisoned(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return from_states(_BadGradient.apply(hidden, tokens[0] == ord("Q")), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "_forward", seen)
        patch.setattr(loss, "linear_cross_entropy", poisoned)
        patch.setattr(megatron_loss, "linear_cross_entropy", poisoned)
        try:
            run_training(settings, None, Runtime(rank, size, rank, size, torch.device("cpu")))
        except UserError as error:
            return str(error)
    return "done"


@pytest.mark.parametrize(
    "engine", ["{zero_stage: 2}", pytest.param("{name: megatron}", marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_not_finite_names_its_document(tmp_path: Path, engine: str) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    bad = tmp_path / "texts" / "31.txt"
    bad.write_text(bad.read_text() + " Q")
    overrides = [*OVERRIDES, "run.steps=14", f"engine={engine}"]
    ends = run_ranks(training_with_a_bad_document, 2, config, overrides)
    assert ends[0] == ends[1]
    assert "the gradient's norm nan; it comes from" in ends[0]
    named = set(re.findall(r"\d\d\.txt", ends[0]))
    # Itself, and at most a neighbour in its group's stream.
    assert "31.txt" in named
    assert len(named) <= 2
    steps = len(read_metrics(run / "metrics.jsonl"))
    assert f"step {steps}: the loss is " in ends[0]


def state_after(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint, file by file."""
    folder = run / "checkpoints" / f"step-{steps:06d}"
    return {
        f"{file.name} {key}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
        if not key.startswith("random")
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "engine",
    [
        "{zero_stage: 0}", pytest.param("{zero_stage: 1}", marks=pytest.mark.slow),
        pytest.param("{zero_stage: 2}", marks=pytest.mark.slow), "{zero_stage: 3}",
        pytest.param("{name: megatron}", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_skipped_step_changes_no_weight_and_training_goes_on(tmp_path: Path, engine: str) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    overrides = [*OVERRIDES, "run.nonfinite=skip", f"engine={engine}"]
    assert run_ranks(training, 2, config, overrides, [3]) == ["done"] * 2
    assert same(state_after(run, 3), state_after(run, 4))
    # The control: other steps change it.
    assert not same(state_after(run, 2), state_after(run, 3))
    assert not same(state_after(run, 4), state_after(run, 5))
    curve = losses(run)
    assert [x == float("inf") for x in curve] == [False] * 3 + [True] + [False] * 2
    # Adam counts updates, not steps: a resumed run must as well.
    assert run_ranks(training, 2, config, overrides, [], "step-000004") == ["done"] * 2
    assert losses(run) == curve


def test_a_run_that_stops_names_the_documents(tmp_path: Path) -> None:
    config, run = str(small_config(tmp_path)), tmp_path / "run"
    ends = run_ranks(training, 2, config, OVERRIDES, [2])
    assert ends[0] == ends[1]
    assert "step 2: the loss is inf" in ends[0]
    assert ".txt" in ends[0]
    assert "run.nonfinite" in ends[0]
    assert len(read_metrics(run / "metrics.jsonl")) == 2
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*"))[-1] == "step-000002"


def test_too_many_in_a_row_stop_a_run_that_skips(tmp_path: Path) -> None:
    config = str(small_config(tmp_path))
    overrides = [*OVERRIDES, "run.nonfinite=skip", "run.steps=30"]
    ends = run_ranks(training, 2, config, overrides, list(range(30)))
    assert ends[0] == ends[1]
    assert "step 9" in ends[0]
    assert "10 such steps in a row" in ends[0]
