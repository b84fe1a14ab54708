"""A trained run as a folder that transformers loads, and that training starts from again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.hf import build_model
from dist_attn.training.checkpoint import read_parameters
from dist_attn.training.checkpoint_files import find_checkpoint
from dist_attn.training.export import export
from tests.distributed.test_refusals import attempt
from tests.e2e.command import small_config
from tests.ranks import run_ranks


@pytest.mark.parametrize("tied", [False, True])
def test_export(tmp_path: Path, tied: bool) -> None:
    config = small_config(tmp_path)
    overrides = ["run.steps=2", f"model.tie_word_embeddings={str(tied).lower()}"]
    assert run_ranks(attempt, 2, str(config), overrides, None) == ["done", "done"]
    run, out = tmp_path / "run", tmp_path / "out"
    export(run, "latest", out)

    trained = read_parameters(find_checkpoint(run / "checkpoints", "latest"))
    assert len(trained) == (20 if tied else 21)
    stock = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, dtype="auto")
    exported = dict(stock.named_parameters())
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[n], trained[n]) for n in trained)
    assert stock.config.max_position_embeddings == 512

    again = build_model(ModelConfig(checkpoint=str(out), dtype="fp32"), 257, seed=9)
    assert all(torch.equal(p, trained[n]) for n, p in again.named_parameters())

    export(run, "step-000002", tmp_path / "half", dtype="bf16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16

    with pytest.raises(ConfigError, match="is not empty"):
        export(run, "latest", out)
    with pytest.raises(ConfigError, match="holds no run"):
        export(tmp_path, "latest", tmp_path / "new")
