"""The Megatron engine: the one invariant, the DeepSpeed loop's losses, and checkpoints.

The reference is the transformers model in one process that knows no sharding, so that these tests
also hold the mapping of weights and gradients between the two.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from dist_attn.config import Config, DataConfig, ModelConfig, OptimizerConfig
from dist_attn.data import build_local_batch, open_corpus, valid_tokens
from dist_attn.groups import GroupPool, single_rank_group
from dist_attn.integrations.engine import Engine, engine_factory
from dist_attn.integrations.hf import build_model
from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner, local_context
from tests.distributed.test_plan_invariance import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    documents_of,
    errors,
)
from tests.ranks import run_ranks

#: Micro-batches of groups of planner ranks, by tensor parallelism; documents are dealt in turn.
PLANS: dict[int, dict[str, list[list[tuple[int, ...]]]]] = {
    1: {
        "alone": [[(0,), (1,), (2,), (3,)]],
        "4": [[(0, 1, 2, 3)]],
        "3+1": [[(0, 1, 2), (3,)]],
        "4 | 2+2 | 1": [[(0, 1, 2, 3)], [(0, 3), (1, 2)], [(2,)]],
    },
    2: {
        "alone": [[(0,), (1,)]],
        "2": [[(0, 1)]],
        "2 | 1 | 1+1": [[(0, 1)], [(1,)], [(0,), (1,)]],
    },
}
CONTROL = {1: "3+1", 2: "2 | 1 | 1+1"}


def config_of(engine: str, cache: str, degree: int = 1, **model: Any) -> Config:
    sizes = {"dtype": "fp32", "num_heads": 4, "num_kv_heads": 2, "loss_chunk_tokens": 300}
    return Config(
        # The vocabulary's 261 rows are divided unevenly.
        model=ModelConfig(**(sizes | {"vocab_size": 261} | model)),
        data=DataConfig(max_document_tokens=700, overlong="split", cache_dir=cache),
        engine={"name": engine, "tensor_parallel_degree": degree},
        optimizer=OptimizerConfig(name="sgd", gradient_clipping=0.0),
    )


def make_plan(shape: list[list[tuple[int, ...]]], strategy: str, lengths: tuple[int, ...]) -> Plan:
    slots = [(m, g) for m, groups in enumerate(shape) for g in range(len(groups))]
    micro_batches = []
    for m, groups in enumerate(shape):
        planned = []
        for g, ranks in enumerate(groups):
            mine = tuple(d for d in range(len(lengths)) if slots[d % len(slots)] == (m, g))
            kind = strategy if len(ranks) > 1 else "local"
            tokens = sum(lengths[d] for d in mine)
            planned.append(Group(ranks, kind, mine, tokens, 0.0, 0.0, 0.0, 0))
        micro_batches.append(MicroBatch(tuple(planned)))
    world_size = 1 + max(r for groups in shape for ranks in groups for r in ranks)
    return Plan(lengths, world_size, tuple(micro_batches), 1.0, 1.0, SolverReport("test"), "", "")


def runtime_here() -> Runtime:
    rank, size = dist.get_rank(), dist.get_world_size()
    return Runtime(rank, size, rank, size, torch.device("cpu"))


def engine_of(config: Config, vocab_size: int, seed: int = 3) -> Engine:
    model = build_model(config.model, vocab_size, seed=seed)
    return engine_factory(config.engine.name)(model, config, torch.device("cpu"))


def reference(cache: str, tied: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by plain autograd of the transformers model over all documents."""
    config = config_of("deepspeed", cache, tie_word_embeddings=tied)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    model = build_model(config.model, corpus.vocab_size, seed=3)
    lengths = corpus.lengths[ids]
    group = Group((0,), "local", tuple(range(len(ids))), int(lengths.sum()), 0.0, 0.0, 0.0, 0)
    batch = build_local_batch(corpus, ids, group)
    context = local_context(batch, single_rank_group(0))
    loss = model(batch.input_ids, batch.shift_labels, batch.position_ids, context)
    mean = loss / valid_tokens(lengths)
    mean.backward()
    return mean.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


class WrongWeight:
    """The engine, but planner rank 0 counts 5% too much."""

    def __init__(self, engine: Engine, degree: int) -> None:
        self._engine = engine
        self._weight = 1.05 if dist.get_rank() < degree else 1.0

    def forward(self, **inputs: object) -> Tensor:
        return self._engine.forward(**inputs) * self._weight

    def backward(self, loss_sum: Tensor, valid: int, *, last: bool) -> None:
        self._engine.backward(loss_sum, valid, last=last)


def run_plans(
    cache: str, degree: int, expected: tuple[float, dict[str, Tensor]], model: dict[str, Any]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Errors of every plan, on one engine; and of a control whose loss weight is wrong."""
    config = config_of("megatron", cache, degree, **model)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    lengths = tuple(int(n) for n in corpus.lengths[ids])
    engine = engine_of(config, corpus.vocab_size)
    pool = GroupPool()
    found = {}
    cases = [(n, s) for n in PLANS[degree] for s in ("ring", "ulysses")] + [("control", "ring")]
    cases.append(("step", "ring"))
    for name, strategy in cases:
        control = name == "control"
        runs = WrongWeight(engine, degree) if control else engine
        runner = StepRunner(runs, corpus, config, runtime_here(), pool)
        shape = PLANS[degree].get(name, PLANS[degree][CONTROL[degree]])
        plan = make_plan(shape, strategy, lengths)
        if name == "step":
            # Ranks run different numbers of micro-batches.
            plan = dataclasses.replace(plan, synchronisation="step")
        result = runner.accumulate(plan, ids)
        gradients = {n: engine.full_gradient(n) for n in expected[1]}
        found[name, strategy] = errors(result.loss, gradients, expected)
        engine.step(lr=0.0)
    pool.close()
    engine.close()
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("degree", "model"),
    [
        (1, {}),
        (2, {"gradient_checkpointing": True, "mlp_tile_tokens": 90}),
        (2, {"tie_word_embeddings": True}),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_plan(
    cache: str, degree: int, model: dict[str, Any]
) -> None:
    expected = run_ranks(reference, 1, cache, model.get("tie_word_embeddings", False))[0]
    for by_case in run_ranks(run_plans, 4, cache, degree, expected, model, timeout_s=120):
        control = by_case.pop(("control", "ring"))
        for case, (loss_error, gradient_error) in by_case.items():
            assert loss_error <= LOSS_TOLERANCE, case
            assert gradient_error <= GRADIENT_TOLERANCE, case
        assert control[0] > 100 * LOSS_TOLERANCE
        assert control[1] > 10 * GRADIENT_TOLERANCE


def save_checkpoint_with_yarn(folder: Path) -> None:
    """A Mistral-type checkpoint of transformers with scaled rotary angles and sharp attention."""
    torch.manual_seed(5)
    config = MistralConfig(
        vocab_size=261, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, sliding_window=None,
        max_position_embeddings=2048, initializer_range=0.3, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0,
            "original_max_position_embeddings": 256,
        },
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)


def run_checkpoint(cache: str, folder: str) -> tuple[float, float, float]:
    """Errors against the transformers model, and how far its loss is without the scaling."""
    config = config_of("megatron", cache, 2)
    config = config.model_copy(update={"model": ModelConfig(checkpoint=folder, dtype="fp32")})
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    lengths = corpus.lengths[ids]
    group = Group((0,), "local", tuple(range(len(ids))), int(lengths.sum()), 0.0, 0.0, 0.0, 0)
    batch = build_local_batch(corpus, ids, group)
    context = local_context(batch, single_rank_group(0))
    model = build_model(config.model, corpus.vocab_size, seed=0)
    inputs = (batch.input_ids, batch.shift_labels, batch.position_ids, context)
    mean = model(*inputs) / valid_tokens(lengths)
    mean.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    rotary = model.model.rotary_emb
    rotary.frequencies = replace(rotary.frequencies, attention_scaling=1.0)
    with torch.no_grad():
        unscaled = model(*inputs).item() / valid_tokens(lengths)

    engine = engine_of(config, corpus.vocab_size)
    pool = GroupPool()
    runner = StepRunner(engine, corpus, config, runtime_here(), pool)
    result = runner.accumulate(make_plan([[(0, 1)]], "ring", tuple(map(int, lengths))), ids)
    gradients = {n: engine.full_gradient(n) for n in expected}
    pool.close()
    engine.close()
    control = abs(unscaled - mean.item()) / mean.item()
    return *errors(result.loss, gradients, (mean.item(), expected)), control


def test_a_checkpoint_of_transformers_is_what_it_was(cache: str, tmp_path: Path) -> None:
    save_checkpoint_with_yarn(tmp_path)
    for loss_error, gradient_error, control in run_ranks(run_checkpoint, 4, cache, str(tmp_path)):
        assert loss_error <= LOSS_TOLERANCE
        assert gradient_error <= GRADIENT_TOLERANCE
        assert control > 1e-3
