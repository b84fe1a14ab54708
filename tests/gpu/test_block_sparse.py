"""The block-sparse kernels on a GPU: Hopper's and Triton's, against a float64 reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import (
    block_sparse_attention,
    block_sparse_backward,
    block_sparse_forward,
    why_not_hopper,
)
from dist_attn_kernels.lists import Tiles, build_lists
from tests.unit.kernels import block_sparse_cases as cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = ["hopper", "triton"]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fresh memory is NaN, so that whatever a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(tiles: Tiles) -> Tiles:
    parts = (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds)
    bounds = None if tiles.intervals is None else tiles.intervals.cuda()
    bits = None if tiles.bits is None else tiles.bits.cuda()
    sizes = (tiles.q_len, tiles.k_len, tiles.num_mask_heads)
    return Tiles(*sizes, *(t.cuda() for t in parts), bounds, bits)


def check(tiles: Tiles, heads: tuple[int, int], dim: int, dtype: torch.dtype, backend: str) -> None:
    """Out, lse and gradients are as close to float64 as torch at the same dtype, times two."""
    q_heads, kv_heads = heads
    inputs = cases.qkv(tiles, q_heads, kv_heads, dim, dtype, "cuda")
    per_query_head = tiles.num_mask_heads == q_heads and q_heads != kv_heads
    lists = build_lists(on_gpu(tiles), q_heads // kv_heads if per_query_head else 1)
    reason = why_not_hopper(inputs[0])
    if backend == "hopper" and reason:
        pytest.skip(f"the Hopper kernels do not apply: {reason}")
    mask, scale = rules.dense_mask(tiles).cuda(), dim**-0.5
    exact = cases.gradients(inputs, mask, scale, torch.float64)
    beside = cases.gradients(inputs, mask, scale, dtype)
    q, k, v = (t.clone().requires_grad_() for t in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, lists, backend=backend)
    live = torch.isfinite(exact[1])
    assert torch.equal(torch.isneginf(lse), ~live)
    assert not out.transpose(0, 1)[~live].any()
    loss = (out * inputs[3]).sum().float() + (torch.where(live, lse, 0.0) * inputs[4]).sum()
    grads = torch.autograd.grad(loss, [q, k, v])
    names = ["out", "lse", "dq", "dk", "dv"]
    got = (out.detach(), lse.detach()[live], *grads)
    want = (exact[0], exact[1][live], *exact[2])
    plain = (beside[0], beside[1][live], *beside[2])
    for name, a, b, c in zip(names, got, want, plain, strict=True):
        bound = 2 * cases.error(c, b) + 1e-5
        assert cases.error(a, b) <= bound, (name, cases.error(a, b), bound)
    # The control, where any query sees a key at all.
    assert not live.any() or cases.error(got[0].roll(1, 0), want[0]) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [63, 64, 127, 129, 700, 1024])
@pytest.mark.parametrize(
    "name",
    ["causal", "window", "documents", "s2", "s2_128_documents", "mixed", "random", "sparse"],
)
def test_masks(name: str, length: int, backend: str) -> None:
    check(cases.named_tiles(name, length, 2), (2, 2), 128, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_head_dims(dim: int, dtype: torch.dtype, backend: str) -> None:
    check(cases.random_mixed_tiles(333, 333, 1, dim), (2, 1), dim, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_heads", [1, 9, 18])
def test_grouped_heads(mask_heads: int, backend: str) -> None:
    """More key/value heads than one launch of the backward serves."""
    check(cases.random_mixed_tiles(513, 513, mask_heads, 7), (18, 9), 64, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
def test_single_blocks_with_grouped_heads(mask_heads: int, dim: int, backend: str) -> None:
    """Neighbouring blocks have so little in common that each is an item of its own."""
    tiles = cases.thinned(cases.random_mixed_tiles(1700, 1500, mask_heads, 7, pairs=2), 0.15)
    per_query_head = mask_heads == 4
    assert build_lists(tiles, 2 if per_query_head else 1).narrow is not None
    check(tiles, (4, 2), dim, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("q_len", "k_len"), [(70, 900), (900, 70), (1, 64), (128, 1)])
def test_different_ranges_and_two_intervals(q_len: int, k_len: int, backend: str) -> None:
    tiles = cases.random_mixed_tiles(q_len, k_len, 1, q_len, pairs=2)
    check(tiles, (2, 2), 128, torch.bfloat16, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_foreign_lse(backend: str) -> None:
    """An lse larger by one shrinks every probability, and with them dv, by e."""
    tiles = cases.named_tiles("s2", 700, 2)
    q, k, v, dout, _ = cases.qkv(tiles, 2, 2, 128, torch.bfloat16, "cuda")
    lists = build_lists(on_gpu(tiles))
    if backend == "hopper" and why_not_hopper(q):
        pytest.skip("the Hopper kernels do not apply")
    out, lse = block_sparse_forward(q, k, v, lists, backend=backend)
    first = block_sparse_backward(dout, (q, k, v), out, lse, lists, backend=backend)
    second = block_sparse_backward(dout, (q, k, v), out, lse + 1, lists, backend=backend)
    assert cases.error(second[2] * torch.e, first[2]) < 1e-2
    assert cases.error(second[2], first[2]) > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mixed", "sparse"])
def test_results_and_gradients_repeat(name: str, backend: str) -> None:
    tiles = cases.named_tiles(name, 900, 2)
    q, k, v, dout, _ = cases.qkv(tiles, 2, 2, 128, torch.bfloat16, "cuda")
    lists = build_lists(on_gpu(tiles))
    if backend == "hopper" and why_not_hopper(q):
        pytest.skip("the Hopper kernels do not apply")
    runs = []
    for _ in range(2):
        out, lse = block_sparse_forward(q, k, v, lists, backend=backend)
        grads = block_sparse_backward(dout, (q, k, v), out, lse, lists, backend=backend)
        runs.append((out, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["s2", "random"])
def test_memory_is_that_of_the_results(name: str) -> None:
    """Beside results the backward holds delta, and lse and delta padded to whole blocks."""
    length, heads, dim = 4096, 8, 128
    tiles = cases.named_tiles(name, length, heads)
    lists = build_lists(on_gpu(tiles))
    q, k, v, dout, _ = cases.qkv(tiles, heads, heads, dim, torch.bfloat16, "cuda")
    if why_not_hopper(q):
        pytest.skip("the Hopper kernels do not apply")

    def run() -> None:
        out, lse = block_sparse_forward(q, k, v, lists)
        block_sparse_backward(dout, (q, k, v), out, lse, lists)

    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    results = 4 * q.nbytes + 4 * heads * length
    extra = 3 * 4 * heads * length
    assert torch.cuda.max_memory_allocated() - before <= results + extra + 2**16
    assert lists.nbytes < 2 * 64 * lists.num_tiles
