"""What a run says of its memory: before training, with every step, at its end, in a refusal."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import UserError
from dist_attn.training import metrics
from dist_attn.training.loop import run_training
from dist_attn.training.run_folder import read_metrics
from dist_attn.training.runtime import Runtime
from tests.e2e.command import small_config
from tests.ranks import run_ranks

DEVICE = {"peak_tflops": 1.0, "memory_gib": 0.1593, "reserved_gib": 0.0}


def said(config: str, overrides: list[str]) -> list[str]:
    """What the main rank prints, and the refusal if there is one."""
    lines: list[str] = []
    metrics.Reporter.say = lambda self, text: lines.append(text)  # type: ignore[method-assign]
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        settings = load_config(config, overrides).on("cpu")
        run_training(settings, None, Runtime(rank, size, rank, size, torch.device("cpu")))
    except UserError as error:
        lines.append(str(error))
    return lines


def settings_of(folder: Path, gib: float) -> list[str]:
    cluster = {"nodes": [{"count": 1, "devices_per_node": 2, "device": "mini"}],
               "devices": {"mini": {**DEVICE, "memory_gib": gib}}}  # fmt: skip
    return [f"cluster={json.dumps(cluster)}", f"run.dir={folder}", "run.steps=2",
            "planner.max_tokens_per_device=null", "engine.bucket_elements=1000"]  # fmt: skip


@pytest.mark.slow
def test_a_run_says_what_it_needs(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    lines = run_ranks(said, 2, str(config), settings_of(tmp_path / "run", 0.2), fresh=True)[0]
    before = next(x for x in lines if x.startswith("memory of a rank with"))
    assert "parameters" in before
    assert "activations" in before
    assert "a rank can hold" in before
    assert any(x.startswith("peak memory of the fullest rank:") for x in lines)
    for step in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert 0.15 < step["predicted_memory_gib"] < 0.2


def test_what_does_not_fit_is_refused_with_the_smallest_change(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    settings = settings_of(tmp_path / "run", DEVICE["memory_gib"])
    (text,) = run_ranks(said, 2, str(config), settings, fresh=True)[0]
    assert ".txt" in text
    assert "GiB holds 119 tokens, 0.2 GiB: " in text
    change = text.split("the smallest change that would fit it: --set ")[1]
    assert change == "model.gradient_checkpointing=true"
    assert not (tmp_path / "run").exists()
    # With it the run goes through.
    lines = run_ranks(said, 2, str(config), [*settings, change], fresh=True)[0]
    assert lines[-1].startswith("done: 2 steps")


@pytest.mark.slow
@pytest.mark.parametrize("cap", [100])
def test_a_cap_of_the_user_is_not_explained_away(tmp_path: Path, cap: int) -> None:
    config = small_config(tmp_path)
    settings = [*settings_of(tmp_path / "run", 0.2), f"planner.max_tokens_per_device={cap}"]
    (text,) = run_ranks(said, 2, str(config), settings, fresh=True)[0]
    assert "smallest change" not in text
