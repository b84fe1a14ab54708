"""Tiles chosen by queries and keys, against their definitions written out."""

from __future__ import annotations

import pytest
import torch

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import block_sparse_attention
from dist_attn_kernels.lists import build_lists
from dist_attn_kernels.selection import permute_keys, permuted_topk, topk_tiles
from tests.unit.kernels import block_sparse_cases as cases

LENGTH, HEADS, KV_HEADS, DIM = 700, 4, 2, 16
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


def inputs(length: int = LENGTH) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]


def test_topk_by_definition() -> None:
    q, k, _ = inputs()
    top_k, local = 2, 2
    mask = rules.dense_mask(topk_tiles(q, k, top_k=top_k, local_blocks=local))
    starts = range(0, LENGTH, 64)
    for kv in range(KV_HEADS):
        for i, start in enumerate(starts):
            mean_q = sum(q[start : start + 64, h].mean(0) for h in (2 * kv, 2 * kv + 1))
            scores = [float(mean_q @ k[64 * j : 64 * j + 64, kv].mean(0)) for j in range(i + 1)]
            past = sorted(range(max(i + 1 - local, 0)), key=lambda j: -scores[j])[:top_k]
            want = set(past) | set(range(max(i + 1 - local, 0), i + 1))
            row = mask[kv, min(start + 63, LENGTH - 1)]
            assert {int(j) // 64 for j in row.nonzero()} == want
    assert not mask.triu(1).any()


def test_topk_stays_inside_documents() -> None:
    q, k, _ = inputs()
    cu = torch.tensor([0, 130, 130, 500, LENGTH])
    mask = rules.dense_mask(topk_tiles(q, k, top_k=3, cu_seqlens=cu))
    document = torch.repeat_interleave(torch.arange(4), torch.diff(cu))
    assert not (mask & (document[:, None] != document)).any()
    assert mask.diagonal(dim1=1, dim2=2).all()


def test_permutation_keeps_causality() -> None:
    """In the keys' own order no query sees a later key, and sees its own segment whole."""
    q, k, _ = inputs()
    order, tiles = permuted_topk(q, k, top_k=1, segment_blocks=2)
    mask = rules.dense_mask(tiles)
    for kv in range(KV_HEADS):
        assert torch.equal(order[:, kv].sort().values, torch.arange(LENGTH))
        back = torch.empty_like(mask[kv])
        back[:, order[:, kv]] = mask[kv]
        assert not back.triu(1).any()
        own = torch.arange(LENGTH)[:, None] // 128 == torch.arange(LENGTH) // 128
        assert torch.equal(back & own, own.tril())
        earlier = (back & ~own).view(LENGTH, LENGTH).sum(1)
        assert set(earlier[128:].tolist()) == {64}
        # A choice over permuted keys is another one than over keys in their order.
        assert (order[:, kv] != torch.arange(LENGTH)).any()


@on_cpu
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_flow_through_what_was_chosen(permuted: bool) -> None:
    length = 270
    q, k, v = inputs(length)
    order = torch.arange(length)[:, None].expand(-1, KV_HEADS)
    tiles = topk_tiles(q, k, top_k=1)
    if permuted:
        order, tiles = permuted_topk(q, k, top_k=1, segment_blocks=2)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    keys, values = (permute_keys(t, order) for t in leaves[1:])
    out, _ = block_sparse_attention(leaves[0], keys, values, build_lists(tiles))
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    keys, values = (permute_keys(t, order) for t in exact[1:])
    want_out, _ = cases.attend(exact[0], keys, values, rules.dense_mask(tiles), DIM**-0.5)
    want = torch.autograd.grad(want_out, exact, dout.double())
    for a, b in zip((out.detach(), *got), (want_out.detach(), *want), strict=True):
        assert cases.error(a, b) < 2e-6
    assert cases.error(got[1].roll(1, 0), want[1]) > 0.5


@pytest.mark.parametrize(
    ("change", "word"), [({"top_k": -1}, "top_k"), ({"local_blocks": 0}, "local")]
)
def test_refusals(change: dict, word: str) -> None:
    q, k, _ = inputs()
    with pytest.raises(ValueError, match=word):
        topk_tiles(q, k, **({"top_k": 1} | change))
