"""Runs whose documents grow longer, and runs on weighted sources, by both engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.data import (
    BatchSampler,
    SamplerPosition,
    build_local_batch,
    open_corpus,
    valid_weight,
)
from dist_attn.groups import single_rank_group
from dist_attn.integrations.hf import build_model
from dist_attn.planner.plan import Group, Plan
from dist_attn.training.run_folder import read_metrics
from dist_attn.training.runtime import Runtime
from dist_attn.training.stages import open_stages
from dist_attn.training.step import local_context
from tests.distributed.test_megatron_runs import farthest
from tests.distributed.test_refusals import attempt, refused
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

STAGES = """
stages:
  - {max_document_tokens: 64, steps: 3, batch: {tokens: 400}}
  - {max_document_tokens: 128, tokens: 2500, rope: {rope_type: linear, factor: 8.0}}
  - max_document_tokens: 512
    rope: {rope_type: dynamic, factor: 4.0, original_max_position_embeddings: 64, rope_theta: 50.0}
"""
LIMITS = (64, 128, 512)
STEPS = 9
MEGATRON = "engine={name: megatron, tensor_parallel_degree: 2}"


def run(config: Path, folder: Path, ranks: int, *more: str, resume: str | None = None) -> None:
    overrides = [f"run.dir={folder}", f"run.steps={STEPS}", "planner.max_tokens_per_device=600",
                 "checkpoint.every_steps=1", "checkpoint.keep=20", *more]  # fmt: skip
    done = run_ranks(attempt, ranks, str(config), overrides, resume, timeout_s=100)
    assert set(done) == {"done"}, done[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_config(tmp_path_factory.mktemp("stages"), STAGES)


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    run(config, config.parent / "whole", 2)
    return config.parent / "whole"


def test_documents_grow_at_the_steps_and_tokens_asked_for(whole: Path) -> None:
    lines = read_metrics(whole / "metrics.jsonl")
    stages = [line["stage"] for line in lines]
    assert stages[:3] == [0] * 3
    second = [line for line in lines if line["stage"] == 1]
    assert sum(line["tokens"] for line in second) >= 2500
    assert sum(line["tokens"] for line in second[:-1]) < 2500
    assert set(stages[3 + len(second) :]) == {2}
    for line in lines:
        plan = Plan.load(whole / "plans" / f"step-{line['step']:06d}.json")
        assert max(plan.lengths) <= LIMITS[line["stage"]]
        if line["stage"] == 0:
            assert sum(plan.lengths) <= 400
    assert any(max(Plan.load(p).lengths) > 128 for p in sorted((whole / "plans").glob("*.json")))


@pytest.mark.parametrize("step", [*(pytest.param(s, marks=pytest.mark.slow) for s in (2, 4)), 3])
def test_resumes_inside_a_stage_and_at_its_boundary(
    config: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    folder = shutil.copytree(whole, tmp_path / "again")
    run(config, folder, 2, resume=f"step-{step:06d}")
    assert losses(folder) == losses(whole)
    assert (folder / f"config-from-step-{step:06d}.yaml").is_file()


@pytest.mark.slow
def test_megatron_grows_alike(config: Path, whole: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "megatron", 2, MEGATRON)
    assert farthest(losses(tmp_path / "megatron"), losses(whole)) < 1e-4
    # In the middle of a stage, from the other engine's checkpoint.
    folder = shutil.copytree(whole, tmp_path / "other")
    run(config, folder, 2, MEGATRON, resume="step-000004")
    assert farthest(losses(folder), losses(whole)) < 1e-4


@pytest.mark.slow
def test_the_scaling_of_a_stage_is_carried_out(config: Path, whole: Path, tmp_path: Path) -> None:
    """The control: with another scaling of the second stage, losses differ from there on."""
    text = config.read_text().replace("factor: 8.0", "factor: 2.0")
    other = config.with_name("other.yaml")
    other.write_text(text)
    run(other, tmp_path / "other", 2)
    found, expected = losses(tmp_path / "other"), losses(whole)
    assert found[:3] == expected[:3]
    assert abs(found[3] - expected[3]) > 1e-6


def dealt(config: str, overrides: list[str]) -> list[tuple[int, list[int], list[int]]]:
    """Per stage: its first epoch, the stored documents of each batch's tokens, and the limit."""
    settings = load_config(config, overrides).on("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    stages = open_stages(settings, Runtime(rank, size, rank, size, torch.device("cpu")))
    found = []
    for stage in stages:
        position: SamplerPosition = stage.start
        whole = np.zeros(len(stage.corpus.source_tokens), int)
        for _ in range(stage.first_step, stage.end_step):
            if position.epoch != stage.start.epoch:
                break
            ids, position = stage.sampler.batch(position)
            np.add.at(whole, stage.corpus.sources[ids], stage.corpus.lengths[ids])
        found.append((stage.start.epoch, whole.tolist(), stage.corpus.source_tokens.tolist()))
    return found


def test_what_was_read_is_not_read_again_before_its_epoch_ends(config: Path) -> None:
    few = ["planner.max_tokens_per_device=600", "run.steps=5",
           "stages=[{max_document_tokens: 512, steps: 2}, {max_document_tokens: 600}]",
           "data.batch.tokens=1500"]  # fmt: skip
    (first, second), *_ = run_ranks(dealt, 2, str(config), few)
    assert first[0] == second[0] == 0
    read = np.array(first[1]) >= 0.5 * np.array(first[2])
    assert 0 < read.sum() < len(read)
    assert not np.any(read & (np.array(second[1]) > 0))
    # The control: without the first stage some of these are read in the same steps.
    alone = ["planner.max_tokens_per_device=600", "run.steps=3", "stages=[]",
             "data.max_document_tokens=600", "data.batch.tokens=1500"]  # fmt: skip
    (only,), *_ = run_ranks(dealt, 2, str(config), alone)
    assert np.any(read & (np.array(only[1]) > 0))


def test_stages_that_cannot_be(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    text = refused(config, ["stages=[{max_document_tokens: 64}, {max_document_tokens: 128}]"])
    assert "stages.0 has no end; give it `steps` or `tokens`" in text
    text = refused(config, ["stages=[{max_document_tokens: 2048}]"])
    assert "stages.0.batch.tokens (1024) is less than stages.0.max_document_tokens (2048)" in text
    # A document of the second stage that no group can hold ends the run before its first step.
    text = refused(
        config, ["planner.max_tokens_per_device=100", "stages=[{max_document_tokens: 64, steps: 1},"
                 " {max_document_tokens: 512}]"])  # fmt: skip
    assert ".txt" in text
    assert not (tmp_path / "run").exists()


def sources(config: Path, weights: tuple[float, float]) -> str:
    texts = config.parent / "texts"
    entries: list[dict[str, Any]] = [
        {"name": n, "loss_weight": w, "corpus": {"kind": "text", "path": str(texts), "glob": g}}
        for n, w, g in zip(("low", "high"), weights, ("[01]*.txt", "[23]*.txt"), strict=True)
    ]
    return f"data.sources={json.dumps(entries)}"


def first_loss(config: str, overrides: list[str], steps_documents: list[int]) -> float:
    """The weighted mean of a step's token losses by a model that knows no ranks."""
    settings = load_config(config, overrides).on("cpu")
    corpus = open_corpus(settings.data, Path(config).parent / "corpus-cache")
    assert corpus.loss_weights is not None
    model = build_model(settings.model, corpus.vocab_size, settings.run.seed)
    ids, total = np.array(steps_documents), 0.0
    for i in range(len(ids)):
        group = Group((0,), "local", (i,), int(corpus.lengths[ids[i]]), 0.0, 0.0, 0.0, 0)
        batch = build_local_batch(corpus, ids, group)
        context = local_context(batch, single_rank_group(0))
        with torch.no_grad():
            loss = model(batch.input_ids, batch.shift_labels, batch.position_ids, context)
        total += float(loss) * float(corpus.loss_weights[ids[i]])
    return total / valid_weight(corpus, ids)


def test_losses_count_by_their_sources_weights(config: Path, tmp_path: Path) -> None:
    plain = config.with_name("plain.yaml")
    plain.write_text(config.read_text().split("stages:")[0])
    few = ["run.steps=3", "data.corpus={kind: stdlib}"]
    weighted, even = sources(config, (3.0, 0.25)), sources(config, (1.0, 1.0))
    run(plain, tmp_path / "two", 2, *few, weighted)
    run(plain, tmp_path / "one", 1, *few, weighted)
    run(plain, tmp_path / "megatron", 2, *few, weighted, MEGATRON)
    run(plain, tmp_path / "even", 2, *few, even)
    two = losses(tmp_path / "two")
    assert farthest(losses(tmp_path / "one"), two) < 1e-5
    assert farthest(losses(tmp_path / "megatron"), two) < 1e-4
    assert farthest(losses(tmp_path / "even"), two) > 1e-3

    settings = load_config(plain, [*few, weighted, f"run.dir={tmp_path / 'two'}"])
    corpus = open_corpus(settings.data, config.parent / "corpus-cache")

    ids, _ = BatchSampler(corpus.lengths, settings.data.batch, settings.run.seed).batch(
        SamplerPosition()
    )
    expected = first_loss(str(plain), [*few, weighted], ids.tolist())
    assert two[0] == pytest.approx(expected, abs=1e-5)
