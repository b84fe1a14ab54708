"""Checkpointed layers: the same gradients, and what their second forward sends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention.context import AttentionContext
from dist_attn.comm.ledger import Ledger
from dist_attn.config import ModelConfig
from dist_attn.groups import GroupPool
from dist_attn.integrations.hf import build_model
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents
from dist_attn.masks.patterns import sliding_window
from tests.distributed.test_refusals import attempt
from tests.e2e.command import losses, small_config
from tests.ranks import run_ranks

LENGTHS = (37, 70, 21)


def gradients_of(
    config: ModelConfig, strategy: str, by_layer: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Gradients of two ranks' shares of documents, and messages by kind."""
    cu_seqlens = np.concatenate([[0], np.cumsum(LENGTHS)])
    pool = GroupPool()
    pool.ensure([(0, 1)])
    group = pool.get((0, 1))
    layout = make_layout("zigzag" if strategy == "ring" else "contiguous", cu_seqlens, 2)
    ledger = Ledger()
    whole = AttentionContext(
        mask=Causal() & Documents(cu_seqlens), layout=layout, group=group, strategy=strategy,
        ledger=ledger,
    )  # fmt: skip
    if by_layer:
        window = replace(whole, mask=whole.mask & sliding_window(8))
        whole = replace(whole, layers=(whole, window))
    mine = torch.from_numpy(layout.positions(group.cp_rank))
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 53, cu_seqlens[-1]))[mine][None]
    starts = torch.from_numpy(cu_seqlens[:-1].repeat(LENGTHS))[mine]
    model = build_model(config, 53, seed=1)
    model(ids, ids, (mine - starts)[None], whole).backward()
    pool.close()
    calls = dict(ledger.calls)
    return {n: p.grad for n, p in model.named_parameters()}, calls


def run_both(strategy: str, by_layer: bool) -> tuple[bool, float, list[dict[str, int]]]:
    plain = ModelConfig(dtype="fp32")
    checkpointed = plain.model_copy(update={"gradient_checkpointing": True})
    kept = checkpointed.model_copy(update={"keep_attention": True})
    again = checkpointed.model_copy(update={"keep_attention": False})
    found = [gradients_of(c, strategy, by_layer) for c in (plain, kept, again)]
    equal = all(torch.equal(found[0][0][n], g) for f in found[1:] for n, g in f[0].items())
    size = max(float(g.abs().max()) for g in found[0][0].values())
    return equal, size, [calls for _, calls in found]


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "gather"])
def test_kept_attention_neither_computes_nor_sends_again(strategy: str, by_layer: bool) -> None:
    sent = np.zeros(3, int)
    for equal, size, calls in run_ranks(run_both, 2, strategy, by_layer):
        assert equal
        assert size > 0
        sent += [sum(c.values()) for c in calls]
    plain, kept, again = sent
    assert again > plain > 0
    if strategy != "ulysses":  # whose all-to-alls are made again, but no attention
        assert kept == plain


def count_kernels(keep: bool) -> int:
    """Kernel calls of one local forward and backward of a model of two layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                self.calls += 1
            return func(*args, **(kwargs or {}))

    assert dist.get_world_size() == 2
    config = ModelConfig(dtype="fp32", gradient_checkpointing=True, keep_attention=keep)
    with Count() as count:
        gradients_of(config, "ulysses", False)
    return count.calls


def test_under_ulysses_the_kernel_runs_once() -> None:
    kept, again = run_ranks(count_kernels, 2, True)[0], run_ranks(count_kernels, 2, False)[0]
    assert again == 2 * kept > 0


@pytest.mark.parametrize(
    "engine",
    [
        "{zero_stage: 3}",
        pytest.param("{name: megatron}", marks=pytest.mark.slow),
        pytest.param("{zero_stage: 2}", marks=pytest.mark.slow),
    ],
)
def test_runs_that_save_memory_learn_alike(tmp_path: Path, engine: str) -> None:
    """Checkpoints, kept attention, offload and tiles are carried out by every engine."""
    config = small_config(tmp_path)
    more = [f"engine={engine}", "run.steps=5", "checkpoint.at_end=false"]
    sizes = ["hidden_size: 32", "intermediate_size: 64"]
    saving = [*sizes, "gradient_checkpointing: true", "offload_checkpoints: true"]
    saving.append("mlp_tile_tokens: 40")
    found = {}
    for name, model in {"plain": sizes, "saving": saving}.items():
        settings = [*more, f"run.dir={tmp_path / name}", f"model={{{', '.join(model)}}}"]
        done = run_ranks(attempt, 2, str(config), settings, None)
        assert set(done) == {"done"}, done[0]
        found[name] = losses(tmp_path / name)
    assert found["plain"] == pytest.approx(found["saving"], abs=2e-5)
    assert found["plain"][-1] < found["plain"][0] - 0.1
