"""Random masks on random layouts by random strategies, forward and backward, against float64."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_attn.attention import attention
from dist_attn.groups import GroupPool, two_level_sets
from dist_attn.layout import from_intervals, make_layout
from dist_attn.masks import (
    BlockDistance,
    BlockList,
    Causal,
    Documents,
    Keys,
    Mask,
    PerHead,
    Queries,
    StridedBlocks,
    Window,
)
from tests.attention_cases import NAMES, Case, dense_mask, exact
from tests.ranks import run_ranks

STRATEGIES = ["ring", "gather", "ulysses", "ring+ring", "ulysses+ring", "ulysses+gather"]


def random_mask(rng: np.random.Generator, case: Case, depth: int = 2) -> Mask:
    if depth and rng.random() < 0.7:
        left, right = (random_mask(rng, case, depth - 1) for _ in range(2))
        return left & right if rng.random() < 0.5 else left | right
    size = case.seq_len
    a, b = sorted(rng.integers(0, size + 1, 2).tolist())
    block = int(rng.integers(1, 9))
    listed = rng.integers(-1, -(-size // block), (case.num_heads, -(-size // 5), 2))
    choices = [
        Causal(),
        Documents(case.cu_seqlens),
        Window(int(rng.integers(-1, 30)), int(rng.integers(-1, 30))),
        Keys(a, b),
        Queries(a, b),
        BlockDistance(block, 2, 0),
        StridedBlocks(size, block, 3, head_shift=1),
        BlockList(5, block, listed),
        PerHead((Causal(), Window(7, 3), Documents(case.cu_seqlens))),
    ]
    return choices[rng.integers(len(choices))]


def random_layout(rng: np.random.Generator, case: Case, cp_size: int):
    kind = ["contiguous", "zigzag", "striped", "balanced", "random"][rng.integers(5)]
    if kind != "random":
        return make_layout(kind, case.cu_seqlens, cp_size)
    owner = np.repeat(rng.integers(0, cp_size, case.seq_len), rng.integers(1, 6))[: case.seq_len]
    held = [np.flatnonzero(owner == r) for r in range(cp_size)]
    return from_intervals(case.seq_len, [np.stack([p, p + 1], 1) for p in held])


def fuzz(seed: int, num_cases: int) -> float:
    """Run the same random cases on every rank; return the largest error of all."""
    rng = np.random.default_rng(seed)
    pool, size = GroupPool(), dist.get_world_size()
    ranks, inner_size = range(size), 2 if size == 4 else 1
    pool.ensure(two_level_sets(ranks, inner_size))
    worst = 0.0
    for i in range(num_cases):
        lengths = tuple(rng.integers(0, 40, rng.integers(1, 5)).tolist())
        kv_heads = int(rng.integers(1, 4))
        case = Case(lengths, kv_heads * int(rng.integers(1, 4)), kv_heads, 8, torch.float64, seed=i)
        mask, layout = random_mask(rng, case), random_layout(rng, case, size)
        strategy = STRATEGIES[rng.integers(len(STRATEGIES))]
        group = pool.get(ranks, inner_size if "+" in strategy else None)
        positions = torch.from_numpy(layout.positions(group.cp_rank))
        x = {n: t[positions] for n, t in case.tensors().items()}
        for n in "qkv":
            x[n].requires_grad_()
        out = attention(
            x["q"], x["k"], x["v"], mask=mask, layout=layout, group=group, strategy=strategy
        )
        out.backward(x["dout"])
        want = exact(case, dense_mask(mask, case))
        got = {"out": out.detach(), **{f"d{n}": x[n].grad for n in "qkv"}}
        for name in NAMES:
            differences = (got[name] - want[name][positions]).abs()
            worst = max(worst, differences.max().item() if differences.numel() else 0.0)
            assert worst < 1e-9, f"case {i}: {name} of {mask} by {strategy} on {lengths}"
    pool.close()
    return worst


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_random_cases(cp_size):
    assert all(0 < worst < 1e-9 for worst in run_ranks(fuzz, cp_size, cp_size, 25))
