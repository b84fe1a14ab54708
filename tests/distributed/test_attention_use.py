"""Attention as models use it: twice in a graph, checkpointed, with padding, in a batch."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_attn.attention import AttentionContext, attend_with_context, attention
from dist_attn.errors import PlanError
from dist_attn.groups import single_rank_group
from dist_attn.layout import from_intervals, make_layout
from dist_attn.masks import Causal
from tests.attention_cases import INNER_SIZE, NAMES, Case, layout_of, mask_of, world_group
from tests.mask_zoo import NUM_HEADS, SEQ_LEN
from tests.ranks import run_ranks

ZOO_CASE = Case((SEQ_LEN,), num_heads=NUM_HEADS, num_kv_heads=2)
STRATEGIES = ["ring", "gather", "ulysses", "ring+ring", "ulysses+ring", "ulysses+gather"]
RARER = [f"{inner}+gather" for inner in ("ring", "gather")] + ["gather+ring"]
RARER += [f"{inner}+ulysses" for inner in ("ring", "gather", "ulysses")]
ODD = Case((7, 0, 1, 41, 18, 1, 1, 30))


def attend_twice_with_checkpoint(case: Case, mask_name: str, strategy: str) -> float:
    """Two layers, the second of which attends twice; against one rank that holds everything."""
    group = world_group(INNER_SIZE[dist.get_world_size()] if "+" in strategy else None)
    layout, mask = layout_of("zigzag", case), mask_of(mask_name, case)
    positions = torch.from_numpy(layout.positions(group.cp_rank))
    x = case.tensors()
    weight = torch.eye(case.head_dim).requires_grad_()
    alone = {
        "layout": make_layout("contiguous", case.cu_seqlens, 1),
        "group": single_rank_group(dist.get_rank()),
        "strategy": "local",
    }
    together = {"layout": layout, "group": group, "strategy": strategy, "deterministic": True}

    def layer(hidden: Tensor, place: dict[str, Any]) -> Tensor:
        k, v = hidden[:, ::2], hidden[:, 1::2]
        return attention(hidden @ weight, k, v, mask=mask, **place)

    def grads(place: dict[str, Any], rows: Any, use_checkpoint: bool = False) -> list[Tensor]:
        def call(h: Tensor) -> Tensor:
            if use_checkpoint:
                return checkpoint(layer, h, place, use_reentrant=False)
            return layer(h, place)

        hidden = x["q"][rows].clone().requires_grad_()
        weight.grad = None
        first = call(hidden)
        (call(first) + call(hidden.flip(-1))).backward(x["dout"][rows])
        return [hidden.grad, weight.grad]

    plain, again = (grads(together, positions, c) for c in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    want = grads(alone, slice(None))
    torch.testing.assert_close(plain[0], want[0][positions], rtol=1e-4, atol=1e-5)
    whole = plain[1].clone()
    dist.all_reduce(whole)
    torch.testing.assert_close(whole, want[1], rtol=1e-4, atol=1e-5)
    return plain[1].norm().item()


@pytest.mark.parametrize("mask_name", ["causal documents", "s2 and a dense head"])
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES, *(pytest.param(s, marks=pytest.mark.slow) for s in RARER)]
)
def test_twice_in_a_graph_and_under_checkpointing(strategy, mask_name):
    case = ODD if mask_name == "causal documents" else ZOO_CASE
    cp_size = 4 if "+" in strategy else 3
    norms = run_ranks(attend_twice_with_checkpoint, cp_size, case, mask_name, strategy)
    assert all(n > 0 for n in norms)


def attend_with_padding(num_padding: int, strategy: str) -> dict[str, Tensor]:
    """Every rank pads its own tokens; the last one holds nothing else."""
    case = Case((9, 6))
    group = world_group()
    layout = from_intervals(15, [np.array([[0, 8]]), np.array([[8, 15]]), np.empty((0, 2))])
    context = AttentionContext(
        mask_of("causal documents", case), layout, group, strategy, num_padding=num_padding
    )
    tensors = case.tensors()
    x = {}
    for name in "qkv":
        local = tensors[name][layout.positions(group.cp_rank)]
        padding = torch.full((num_padding, *local.shape[1:]), 1e9)
        x[name] = torch.cat([local, padding]).requires_grad_()
    out = attend_with_context(x["q"], x["k"], x["v"], context)
    out.square().sum().backward()
    return {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_padding_changes_nothing(strategy):
    without = run_ranks(attend_with_padding, 3, 0, strategy)
    padded = run_ranks(attend_with_padding, 3, 5, strategy)
    for a, b in zip(without, padded, strict=True):
        for name in NAMES:
            assert torch.equal(a[name], b[name][:-5])
            assert torch.equal(b[name][-5:], torch.zeros_like(b[name][-5:]))


def attend_in_a_batch() -> None:
    group = world_group()
    layout = layout_of("zigzag", ODD)
    positions = torch.from_numpy(layout.positions(group.cp_rank))
    q, k, v = (t[positions] for n, t in ODD.tensors().items() if n != "dout")
    options = {"mask": Causal(), "layout": layout, "group": group, "strategy": "ring"}
    batch = [torch.stack([x, x.flip(-1)]).requires_grad_() for x in (q, k, v)]
    out, lse = attention(*batch, **options, return_lse=True)
    out.square().sum().backward()
    for i, flipped in enumerate((False, True)):
        one = [(x.flip(-1) if flipped else x).clone().requires_grad_() for x in (q, k, v)]
        want, want_lse = attention(*one, **options, return_lse=True)
        want.square().sum().backward()
        assert torch.equal(out[i], want)
        assert torch.equal(lse[i], want_lse)
        assert all(torch.equal(b.grad[i], o.grad) for b, o in zip(batch, one, strict=True))
    with pytest.raises(PlanError, match="same batch"):
        attention(batch[0], batch[1][:1], batch[2], **options)


def test_a_batch_is_each_of_its_streams():
    run_ranks(attend_in_a_batch, 2)
