"""Adapters beside frozen weights: trained, resumed, and loaded by peft from an export."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_attn.config import ModelConfig
from dist_attn.integrations.hf import build_model
from dist_attn.training.checkpoint import read_parameters
from dist_attn.training.checkpoint_files import find_checkpoint
from dist_attn.training.export import export
from tests.distributed.test_refusals import attempt
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks
from tests.unit.test_hf import context_of

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local checkpoint of transformers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run(config: Path, folder: Path, base: Path, stage: int, *more: str, resume: str = "") -> None:
    lora = f"model={{checkpoint: {base}, lora: {{rank: 4, alpha: 16.0}}{''.join(more)}}}"
    settings = [f"run.dir={folder}", "run.steps=8", f"engine={{zero_stage: {stage}}}", lora,
                "optimizer.lr=0.02"]  # fmt: skip
    done = run_ranks(attempt, 2, str(config), settings, resume or None, timeout_s=100)
    assert set(done) == {"done"}, done[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_learn_and_resume(base: Path, tmp_path: Path, stage: int) -> None:
    config = small_config(tmp_path)
    run(config, tmp_path / "run", base, stage)
    whole = losses(tmp_path / "run")
    assert whole[-1] < whole[0] - 0.2
    names = read_parameters(find_checkpoint(tmp_path / "run" / "checkpoints", "latest"))
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in n for n in names)
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    run(config, again, base, stage, resume="step-000004")
    assert losses(again) == whole
    # With recomputation, whose first layer's input needs no gradient, and on the other stage.
    run(config, tmp_path / "saving", base, 5 - stage, ", gradient_checkpointing: true")
    assert losses(tmp_path / "saving") == pytest.approx(whole, abs=2e-5)


def test_peft_loads_what_is_exported(base: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run(config, tmp_path / "run", base, 2)
    export(tmp_path / "run", "latest", tmp_path / "adapters")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapters")
    )
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 30)))
    labels = ids.roll(-1)
    with torch.no_grad():
        logits = theirs(input_ids=ids, use_cache=False).logits[0]
        expected = torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum").item()
        with theirs.disable_adapter():
            bare = theirs(input_ids=ids, use_cache=False).logits[0]
        without = torch.nn.functional.cross_entropy(bare, labels[0], reduction="sum").item()

    section = ModelConfig(checkpoint=str(base), dtype="fp32", lora={"rank": 4, "alpha": 16.0})
    ours = build_model(section, 257, seed=7)
    found = read_parameters(find_checkpoint(tmp_path / "run" / "checkpoints", "latest"))
    assert not ours.load_state_dict(found, strict=False).unexpected_keys
    with torch.no_grad():
        loss = ours(ids, labels, torch.arange(30)[None], context_of((30,))).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(without - expected) > 0.1
    with safe_open(tmp_path / "adapters" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 28


def test_what_adapters_do_not_go_with() -> None:
    with pytest.raises(ValueError, match="knows no adapters"):
        ModelConfig(lora={}, mlp_tile_tokens=8)
