"""Lists made by a thread during the backward before: the same step to the bit, by both engines."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_attn.attention.prepare import Preparer
from dist_attn.attention.tile_step import TileStep
from dist_attn.config import Config, validate
from dist_attn.groups import GroupPool
from dist_attn.integrations.engine import engine_factory
from dist_attn.integrations.hf import build_model
from dist_attn.planner.fitting import layer_rules_of
from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.planner.shape import ModelShape
from dist_attn.training.runtime import Runtime
from dist_attn.training.step import StepRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1500, 700, 1, 333, 2048, 1500, 700, 1)
#: Documents of each micro-batch; the first and the last are alike, the third is another stream.
ALONE = [(0, 1, 2), (3, 4), (5, 6, 7)]
TOGETHER = [(0, 1, 2, 3, 4, 5, 6, 7)]
MASKS = [{"kind": "s2", "block_tokens": 64, "local_blocks": 2, "stride_blocks": 4}]
VOCAB = 503


class Corpus:
    lengths = np.array(LENGTHS, np.int64)
    loss_weights = None

    def check(self) -> None:
        pass

    def gather(self, documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (documents * 7919 + positions * 104729) % 1000003 % VOCAB


def plan_of(shape: list[tuple[int, ...]]) -> Plan:
    made = []
    for documents in shape:
        tokens = sum(LENGTHS[d] for d in documents)
        made.append(MicroBatch((Group((0,), "local", documents, tokens, 0.0, 0.0, 0.0, 0),)))
    return Plan(LENGTHS, 1, tuple(made), 1.0, 1.0, SolverReport("test"), "", "")


def config_of(engine: dict[str, Any]) -> Config:
    model = {"hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "num_kv_heads": 2,
             "num_layers": 2, "vocab_size": VOCAB, "dtype": "bf16"}  # fmt: skip
    data = {
        "model": model, "engine": engine, "attention": {"masks": MASKS},
        # Megatron's distributed optimizer takes nothing else.
        "optimizer": {"name": "adamw", "gradient_clipping": 0.0},
    }  # fmt: skip
    return validate(Config, data, "test").on("cuda")


def steps(
    runtime: Runtime, engine: dict[str, Any], shape: list[tuple[int, ...]]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the second of two equal steps."""
    config = config_of(engine)
    model = build_model(config.model, VOCAB, seed=3)
    names = [n for n, _ in model.named_parameters()]
    made = engine_factory(config.engine.name)(model, config, runtime.device)
    rules = layer_rules_of(config, ModelShape.from_config(config.model))
    corpus: Any = Corpus()
    runner = StepRunner(made, corpus, config, runtime, GroupPool(), rules)
    loss, gradients = 0.0, {}
    for _ in range(2):
        runner.forget_streams()
        loss = runner.accumulate(plan_of(shape), np.arange(len(LENGTHS))).loss
        gradients = {n: made.full_gradient(n).clone() for n in names}
        made.step(lr=0.0)
    made.close()
    return loss, gradients


@pytest.mark.parametrize("engine", [{"zero_stage": 1}, {"zero_stage": 2}, {"name": "megatron"}])
def test_nothing_changes_to_the_bit(alone: Runtime, engine: dict[str, Any]) -> None:
    ahead: list[int] = []
    prepare = TileStep.prepare

    def watched(self: TileStep, *args: Any) -> object:
        ahead.append(len(self._block_sparse))
        return prepare(self, *args)

    with mock.patch.object(TileStep, "prepare", watched):
        loss, gradients = steps(alone, engine, ALONE)
    # The second and third micro-batch of both steps; the third is what the first was.
    assert ahead == [0, 1, 0, 1]
    with mock.patch.object(Preparer, "begin"):
        other_loss, others = steps(alone, engine, ALONE)
    assert loss == other_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
    # Another plan: the same step to bf16's rounding.
    whole_loss, whole = steps(alone, engine, TOGETHER)
    assert loss == pytest.approx(whole_loss, rel=2e-3)
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).norm() <= 4e-2 * whole[name].norm(), name
