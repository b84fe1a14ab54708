"""Every configuration that is shipped: it loads, its longest document fits, and it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dist_attn.config import load_config
from dist_attn.planner.fitting import described_cluster, planning_problem_of
from tests.distributed.test_refusals import attempt
from tests.e2e.command import ROOT, losses, small_config
from tests.ranks import run_ranks

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.yaml"))
#: What of a configuration is not small, with which a model of a test replaces it.
SMALL_MODEL = ["model.vocab_size=260", "model.hidden_size=32", "model.intermediate_size=64",
               "model.num_layers=6", "model.num_heads=4", "model.num_kv_heads=2"]  # fmt: skip


def llama(folder: Path) -> Path:
    """A small checkpoint of transformers."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_longest_document_fits_the_cluster(name: str, tmp_path: Path) -> None:
    more = []
    if name == "continue_llama_128k":
        # The sizes of an 8B.
        (tmp_path / "config.json").write_text(json.dumps({
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        }))  # fmt: skip
        more = [f"model.checkpoint={tmp_path}"]
    on_cpu = "quickstart" in name
    config = load_config(ROOT / "configs" / f"{name}.yaml", more)
    if isinstance(config.cluster, str):
        cluster = "cpu4" if on_cpu else "h100_64"
        more.append(f"cluster=clusters/{cluster}.yaml")
        config = load_config(ROOT / "configs" / f"{name}.yaml", more)
    config = config.on("cpu" if on_cpu else "cuda")
    for i in range(max(len(config.stages), 1)):
        at = config.at_stage(i)
        problem = planning_problem_of(at, described_cluster(at), 260)
        problem.solve((at.data.max_document_tokens,))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CONFIGS if "quickstart" not in n])
def test_it_starts_scaled_down(name: str, tmp_path: Path) -> None:
    texts = small_config(tmp_path).parent / "texts"
    corpus = f"{{kind: text, path: {texts}}}"
    path = ROOT / "configs" / f"{name}.yaml"
    settings = ["cluster=auto", f"run.dir={tmp_path / 'run'}", "run.steps=6", "run.timeout_s=60",
                "data.tokenizer=bytes", "model.dtype=fp32", "engine.bucket_elements=10000",
                "checkpoint.every_steps=3", "optimizer.lr=0.01"]  # fmt: skip
    if name == "1m":
        sources = [{"name": n, "corpus": {"kind": "text", "path": str(texts), "glob": g}}
                   for n, g in (("books", "[01]*.txt"), ("code", "[23]*.txt"))]  # fmt: skip
        stages = [{"max_document_tokens": 64, "steps": 2},
                  {"max_document_tokens": 128, "tokens": 1500, "rope": {"rope_theta": 1e6}},
                  {"max_document_tokens": 512, "rope": {"rope_theta": 5e7}}]  # fmt: skip
        settings += [f"data.sources={json.dumps(sources)}", f"stages={json.dumps(stages)}"]
    else:
        settings += [f"data.corpus={corpus}", "data.max_document_tokens=512"]
    settings.append("data.batch={tokens: 1024}")
    if name == "continue_llama_128k":
        settings.append(f"model.checkpoint={llama(tmp_path / 'llama')}")
    else:
        settings += SMALL_MODEL
    done = run_ranks(attempt, 4, str(path), settings, None, timeout_s=100)
    assert set(done) == {"done"}, done[0]
    found = losses(tmp_path / "run")
    assert len(found) == 6
    assert all(0 < x < 7 for x in found)
