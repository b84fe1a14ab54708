"""On 1 to 8 ranks the error against float64 is one device's, and does not grow with the ranks."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.attention import attention
from dist_attn.groups import GroupPool, two_level_sets
from dist_attn.layout import make_layout
from tests.attention_cases import (
    NAMES,
    Case,
    assert_as_good_as_torch,
    dense_mask,
    exact,
    mask_of,
    plain_torch,
    together,
)
from tests.mask_zoo import CU, NUM_HEADS
from tests.ranks import run_ranks

RANKS = 8
#: The stream of the mask zoo: documents of 7, 0, 1, 41, 18, 1 and 21 tokens.
LENGTHS = tuple(int(n) for n in CU[1:] - CU[:-1])
#: Strategy, layout, and for each number of ranks the size of a node.
RUNS = {
    "ring": ("zigzag", {n: None for n in range(1, RANKS + 1)}),
    "gather": ("balanced", {n: None for n in range(1, RANKS + 1)}),
    "ulysses": ("contiguous", {n: None for n in range(1, RANKS + 1)}),
    "ring+ring": ("striped", {4: 2, 6: 3, 8: 4}),
    "ulysses+ring": ("zigzag", {4: 2, 6: 2, 8: 4}),
    "ulysses+gather": ("balanced", {4: 2, 6: 3, 8: 2}),
}
RARER_RUNS = {
    "ring+gather": ("zigzag", {4: 2, 6: 3, 8: 2}),
    "ring+ulysses": ("balanced", {4: 2, 6: 3, 8: 4}),
    "gather+ring": ("contiguous", {4: 2, 6: 2, 8: 4}),
    "gather+gather": ("zigzag", {4: 2, 6: 3, 8: 2}),
    "gather+ulysses": ("striped", {4: 2, 6: 2, 8: 4}),
    "ulysses+ulysses": ("zigzag", {4: 2, 6: 3, 8: 2}),
}


def on_subsets(case: Case, mask_name: str, strategy: str) -> dict[int, dict[str, Tensor] | None]:
    """By number of ranks, this rank's part; None where it does not take part."""
    layout_kind, nodes = {**RUNS, **RARER_RUNS}[strategy]
    pool, mask = GroupPool(), mask_of(mask_name, case)
    found: dict[int, dict[str, Tensor] | None] = {}
    for cp_size, inner_size in nodes.items():
        ranks = range(cp_size)
        pool.ensure([ranks] if inner_size is None else two_level_sets(ranks, inner_size))
        found[cp_size] = None
        if dist.get_rank() >= cp_size:
            continue
        group = pool.get(ranks, inner_size)
        layout = make_layout(layout_kind, case.cu_seqlens, cp_size)
        positions = torch.from_numpy(layout.positions(group.cp_rank))
        x = {name: t[positions] for name, t in case.tensors().items()}
        for name in "qkv":
            x[name].requires_grad_()
        out, lse = attention(
            x["q"], x["k"], x["v"], mask=mask, layout=layout, group=group, strategy=strategy,
            return_lse=True,
        )  # fmt: skip
        out.backward(x["dout"])
        grads = {f"d{n}": x[n].grad for n in "qkv"}
        part = {"positions": positions, "out": out.detach(), "lse": lse.t(), **grads}
        found[cp_size] = part
    dist.barrier()
    pool.close()
    return found


@functools.cache
def wanted(case: Case, mask_name: str) -> tuple[Tensor, dict[str, Tensor]]:
    allowed = dense_mask(mask_of(mask_name, case), case)
    return allowed, exact(case, allowed)


@pytest.mark.parametrize(
    ("mask_name", "dtype"),
    [
        ("causal documents", torch.bfloat16),
        ("s2 and a dense head", torch.float32),
        pytest.param("causal documents", torch.float32, marks=pytest.mark.slow),
        pytest.param("s2 and a dense head", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "strategy", [*RUNS, *(pytest.param(s, marks=pytest.mark.slow) for s in RARER_RUNS)]
)
def test_the_error_is_that_of_one_device(strategy: str, mask_name: str, dtype: torch.dtype) -> None:
    case = Case(LENGTHS, num_heads=NUM_HEADS, num_kv_heads=2, head_dim=16, dtype=dtype)
    allowed, want = wanted(case, mask_name)
    plain = root_mean_square(plain_torch(case, allowed), want)
    found = run_ranks(on_subsets, RANKS, case, mask_name, strategy)
    for cp_size in {**RUNS, **RARER_RUNS}[strategy][1]:
        parts = [part for by_size in found if (part := by_size[cp_size]) is not None]
        assert len(parts) == cp_size
        got = together(parts, case)
        assert_as_good_as_torch(got, case, allowed)
        # The mean of all elements is steadier than the worst one, so that growth would show.
        for name, square in root_mean_square(got, want).items():
            assert square <= 1.3 * plain[name], (cp_size, name)


def root_mean_square(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {n: (got[n].double() - want[n]).square().mean().sqrt().item() for n in NAMES}


def test_gradients_that_travel_in_16_bits_lose_some_at_every_hop() -> None:
    """The control: what does grow with the ring is seen by the same measure."""
    case = Case((256,), num_kv_heads=4, head_dim=16, dtype=torch.bfloat16)
    want = exact(case, dense_mask(mask_of("full", case), case))
    plain = root_mean_square(plain_torch(case, dense_mask(mask_of("full", case), case)), want)
    for narrow, bounds in ((False, (0.5, 1.25)), (True, (1.35, 4.0))):
        got = together(run_ranks(ring_of_8, RANKS, case, narrow), case)
        ratio = root_mean_square(got, want)["dk"] / plain["dk"]
        assert bounds[0] < ratio < bounds[1], narrow


def ring_of_8(case: Case, narrow: bool) -> dict[str, Tensor]:
    group = GroupPool().get(range(RANKS))
    layout = make_layout("contiguous", case.cu_seqlens, RANKS)
    positions = torch.from_numpy(layout.positions(group.cp_rank))
    x = {name: t[positions] for name, t in case.tensors().items()}
    for name in "qkv":
        x[name].requires_grad_()
    out = attention(
        x["q"], x["k"], x["v"], mask=mask_of("full", case), layout=layout, group=group,
        strategy="ring", gradient_dtype=torch.bfloat16 if narrow else None,
    )  # fmt: skip
    out.backward(x["dout"])
    grads = {f"d{n}": x[n].grad for n in "qkv"}
    return {"positions": positions, "out": out.detach(), "lse": out.detach(), **grads}
