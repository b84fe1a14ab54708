"""A plain megatron.core model, set up as Megatron-LM does, with our attention by its spec."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import import_module

from dist_attn.attention.context import AttentionContext
from dist_attn.config import ModelConfig
from dist_attn.data import LocalBatch, build_local_batch, open_corpus, valid_tokens
from dist_attn.groups import GroupPool, single_rank_group
from dist_attn.integrations.hf import CausalLM, build_model
from dist_attn.integrations.megatron import PackedContext, attach
from dist_attn.integrations.megatron_groups import MegatronGroups
from dist_attn.integrations.megatron_model import build_megatron_model
from dist_attn.planner.plan import Group
from dist_attn.training.step import local_context
from dist_attn.training.topology import Topology
from tests.distributed.test_megatron import config_of, documents_of
from tests.megatron_shim import cuda_is_cpu
from tests.ranks import run_ranks

DEGREE = 2


def stock_loss(cache: str, with_rotary: bool) -> float:
    """Mean loss of all documents on a ring of two planner ranks of two tensor ranks each."""
    config = config_of("megatron", cache, DEGREE, vocab_size=262)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    topology = Topology(dist.get_world_size(), dist.get_rank(), DEGREE)
    lengths = corpus.lengths[ids]
    group = Group((0, 1), "ring", tuple(range(len(ids))), int(lengths.sum()), 0.0, 0.0, 0.0, 0)
    pool = GroupPool()
    pool.ensure(topology.everyone(group.ranks))
    comm = pool.get(topology.members(group.ranks))
    batch = build_local_batch(corpus, ids, group, cp_rank=comm.cp_rank)

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=DEGREE)
    ours = build_weights(config.model, corpus.vocab_size)
    model = GPTModel(
        ours.config,
        # What Megatron-LM does with --spec dist_attn.integrations.megatron layer_spec.
        import_module(("dist_attn.integrations.megatron", "layer_spec")),
        vocab_size=262,
        max_sequence_length=4096,
        position_embedding_type="rope",
    )
    if with_rotary:
        model = attach(model)
    model.load_state_dict(ours.state_dict())
    # Only Megatron's own angles ask for a CUDA device.
    with nullcontext() if with_rotary else cuda_is_cpu():
        return mean_loss(model, batch, local_context(batch, comm), pool)


def mean_loss(
    model: GPTModel, batch: LocalBatch, context: AttentionContext, pool: GroupPool
) -> float:
    packed = PackedContext(
        position_ids=batch.position_ids,
        attention_context=context,
        max_seqlen_q=batch.input_ids.numel(),
        max_seqlen_kv=batch.input_ids.numel(),
    )
    loss_L = model(
        batch.input_ids, batch.position_ids, None, labels=batch.shift_labels,
        packed_seq_params=packed,
    )  # fmt: skip
    valid = (batch.shift_labels != -100).to(loss_L.dtype)
    sums = torch.stack(((loss_L * valid).sum(), valid.sum())).detach()
    dist.all_reduce(sums)
    (loss_L * valid).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    parallel_state.destroy_model_parallel()
    pool.close()
    return float(sums[0] / sums[1])


def build_weights(config: ModelConfig, vocab_size: int) -> torch.nn.Module:
    groups = MegatronGroups.make(DEGREE)
    hf = sharp_model(config, vocab_size)
    return build_megatron_model(hf, config, groups, torch.device("cpu"))[0]


def sharp_model(config: ModelConfig, vocab_size: int) -> CausalLM:
    """A model that attends to something, so that positions matter to its loss."""
    model = build_model(config, vocab_size, seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "_proj" in name or "lm_head" in name:
                param.mul_(8)
    return model


def expected_loss(cache: str) -> float:
    """Mean loss of all documents by the transformers model in this process alone."""
    config = config_of("deepspeed", cache, vocab_size=262)
    corpus = open_corpus(config.data, Path(cache))
    ids = documents_of(corpus.lengths)
    lengths = corpus.lengths[ids]
    group = Group((0,), "local", tuple(range(len(ids))), int(lengths.sum()), 0.0, 0.0, 0.0, 0)
    batch = build_local_batch(corpus, ids, group)
    context = local_context(batch, single_rank_group(0))
    model = sharp_model(config.model, corpus.vocab_size)
    with torch.no_grad():
        loss = model(batch.input_ids, batch.shift_labels, batch.position_ids, context)
    return float(loss) / valid_tokens(lengths)


def test_the_loss_is_that_of_one_process(tmp_path: Path) -> None:
    expected = run_ranks(expected_loss, 1, str(tmp_path))[0]
    found = run_ranks(stock_loss, 4, str(tmp_path), True)
    assert found == [pytest.approx(expected, rel=1e-5)] * 4


def test_without_explicit_angles_it_is_another(tmp_path: Path) -> None:
    """The control: Megatron's own angles count along the rank's tokens, not inside documents."""
    expected = run_ranks(expected_loss, 1, str(tmp_path))[0]
    for found in run_ranks(stock_loss, 4, str(tmp_path), False):
        assert abs(found - expected) > 100 * 1e-5 * expected
