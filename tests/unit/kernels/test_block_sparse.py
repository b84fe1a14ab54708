"""The Triton kernels in the interpreter against a float64 reference."""

from __future__ import annotations

import pytest
import torch

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import (
    block_sparse_attention,
    block_sparse_backward,
    block_sparse_forward,
)
from dist_attn_kernels.block_sparse_triton import (
    A100_SHARED_BYTES,
    H100_SHARED_BYTES,
    pipeline_stages,
)
from dist_attn_kernels.lists import FULL, Tiles, build_lists
from tests.unit.kernels import block_sparse_cases as cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs tests/gpu instead")


def check(tiles: Tiles, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Forward and backward are as close to float64 as torch at the same dtype, times two."""
    per_query_head = tiles.num_mask_heads == heads and heads != kv_heads
    lists = build_lists(tiles, heads // kv_heads if per_query_head else 1)
    inputs = cases.qkv(tiles, heads, kv_heads, dim, dtype)
    mask, scale = rules.dense_mask(tiles), dim**-0.5
    exact = cases.gradients(inputs, mask, scale, torch.float64)
    plain = cases.gradients(inputs, mask, scale, dtype)
    q, k, v = (t.clone().requires_grad_() for t in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, lists)
    live = torch.isfinite(exact[1])
    assert torch.equal(torch.isneginf(lse), ~live)
    assert not out.transpose(0, 1)[~live].any()
    loss = (out * inputs[3]).sum().float() + (torch.where(live, lse, 0.0) * inputs[4]).sum()
    grads = torch.autograd.grad(loss, [q, k, v])
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    for got, want, beside in zip(
        (out, lse[live], *grads),
        (exact[0], exact[1][live], *exact[2]),
        (plain[0], plain[1][live], *plain[2]),
        strict=True,
    ):
        assert cases.error(got, want) <= 2 * cases.error(beside, want) + floor


@pytest.mark.parametrize(
    "name",
    ["causal", "window", "documents", "s2", "s2_128_documents", "mixed", "random", "sparse"],
)
@pytest.mark.parametrize("length", [130, 257])
def test_masks(name: str, length: int) -> None:
    torch.manual_seed(1)
    check(cases.named_tiles(name, length, 2), 2, 2, 16, torch.float32)


@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_grouped_heads(mask_heads: int) -> None:
    torch.manual_seed(2)
    check(cases.random_mixed_tiles(200, 200, mask_heads, 7), 4, 2, 16, torch.float32)


@pytest.mark.parametrize("dim", [64, 96, 192])
def test_head_dims(dim: int) -> None:
    torch.manual_seed(3)
    check(cases.random_mixed_tiles(129, 129, 1, 3), 1, 1, dim, torch.float16)


@pytest.mark.parametrize(("q_len", "k_len"), [(70, 300), (300, 70), (1, 64), (128, 1)])
def test_different_ranges_and_two_intervals(q_len: int, k_len: int) -> None:
    torch.manual_seed(4)
    check(cases.random_mixed_tiles(q_len, k_len, 1, q_len, pairs=2), 1, 1, 16, torch.float32)


def test_nothing_listed() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    lists = build_lists(Tiles(100, 80, 1, none, none, none, none))
    q, k = torch.randn(100, 2, 16), torch.randn(80, 2, 16)
    out, lse = block_sparse_forward(q, k, k, lists)
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert not any(g.any() for g in block_sparse_backward(q, (q, k, k), out, lse, lists))


def test_two_parts_of_the_keys_make_the_whole() -> None:
    """A ring: forward by halves of the keys, merged; backward by halves with merged out and lse."""
    torch.manual_seed(5)
    length, cut = 200, 90
    whole = cases.named_tiles("causal", length, 1)
    inputs = cases.qkv(whole, 2, 1, 16, torch.float32)
    q, k, v, dout, _ = inputs
    inputs[4] = torch.zeros_like(inputs[4])
    exact = cases.gradients(inputs, rules.dense_mask(whole), 0.25, torch.float64)
    ranges = [slice(0, cut), slice(cut, length)]
    lists = []
    for part in ranges:
        bounds = rules.causal_intervals(length, offset=-part.start)
        size = part.stop - part.start
        bounds = bounds.clamp(max=size)
        lists.append(build_lists(rules.tiles_from_intervals(bounds, size)))
    parts = [block_sparse_forward(q, k[r], v[r], s) for r, s in zip(ranges, lists, strict=True)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * (p - lse).exp().t().unsqueeze(-1) for o, p in parts)
    assert isinstance(out, torch.Tensor)
    assert cases.error(out, exact[0]) < 1e-6
    grads = [
        block_sparse_backward(dout, (q, k[r], v[r]), out, lse, s)
        for r, s in zip(ranges, lists, strict=True)
    ]
    assert cases.error(grads[0][0] + grads[1][0], exact[2][0]) < 2e-6
    for i in (1, 2):
        got = torch.cat([grads[0][i], grads[1][i]])
        assert cases.error(got, exact[2][i]) < 2e-6
    # The control: each part's own lse gives other gradients.
    own = block_sparse_backward(dout, (q, k[:cut], v[:cut]), *parts[0], lists[0])
    assert cases.error(own[1], exact[2][1][:cut]) > 1e-2


def test_a_wrong_mask_lands_outside() -> None:
    torch.manual_seed(6)
    tiles = cases.named_tiles("s2", 257, 2)
    inputs = cases.qkv(tiles, 2, 2, 16, torch.float32)
    exact = cases.gradients(inputs, rules.dense_mask(tiles), 0.25, torch.float64)
    other = Tiles(257, 257, 2, *(t[1:] for t in (tiles.heads, tiles.q_blocks, tiles.k_blocks)),
                  tiles.kinds[1:], tiles.intervals)  # fmt: skip
    out, _ = block_sparse_forward(*inputs[:3], build_lists(other))
    assert cases.error(out, exact[0]) > 1e-2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": (100, 2, 17)}, "head_dim"),
        ({"q": (90, 2, 16)}, "queries"),
        ({"q": (100, 3, 16)}, "kv_heads"),
        ({"backend": "hopper"}, "Hopper"),
        ({"softmax_scale": 0.0}, "positive"),
    ],
)
def test_refusals(change: dict, word: str) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    lists = build_lists(Tiles(100, 100, 1, zero, zero, zero, zero + FULL))
    q = torch.randn(change.pop("q", (100, 2, 16)))
    k = torch.randn(100, 2, q.shape[2])
    with pytest.raises(ValueError, match=word):
        block_sparse_forward(q, k, k, lists, **change)


def test_stages_by_shared_memory() -> None:
    assert pipeline_stages(256, "backward", A100_SHARED_BYTES) == 2
    assert pipeline_stages(256, "backward", 101376) == 1
    assert pipeline_stages(512, "forward", H100_SHARED_BYTES) == 2
    assert pipeline_stages(512, "forward", A100_SHARED_BYTES) == 1
    for row_bytes, kind, shared in [
        (512, "backward", A100_SHARED_BYTES),
        (512, "forward", 101376),
        (1024, "forward", H100_SHARED_BYTES),
    ]:
        with pytest.raises(ValueError, match="head_dim of at most 128"):
            pipeline_stages(row_bytes, kind, shared)
