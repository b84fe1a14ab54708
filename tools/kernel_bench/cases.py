"""Masks at sizes for the kernel benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_attn_kernels import rules
from dist_attn_kernels.lists import Tiles

K = 1024


@dataclass(frozen=True)
class Case:
    """A mask at a size."""

    make: Callable[[], Tiles]
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    block: int = 128


def s2(seq_len: int, block: int, stride: int = 16) -> Case:
    """The S2 pattern of the published figures: 1024 local tokens, every 16th block."""
    return Case(
        lambda: rules.s2_tiles(
            seq_len,
            32,
            local_blocks=1024 // block,
            stride_blocks=stride,
            block=block,
            device="cuda",
        ),
        block=block,
    )


def packed(seq_len: int) -> Tiles:
    """Documents with long-tailed lengths, packed and causal."""
    gen = torch.Generator().manual_seed(7)
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        lengths.append(
            int(min(16 * K, 1500 * math.exp(1.2 * torch.randn((), generator=gen).item())))
        )
    ends = torch.tensor([0, *lengths]).cumsum(0).clamp(max=seq_len)
    bounds = rules.causal_intervals(seq_len, cu_seqlens=ends, device="cuda")
    return rules.tiles_from_intervals(bounds, seq_len)


def plain(seq_len: int, window: int = -1) -> Tiles:
    """Causal, with or without a window."""
    return rules.tiles_from_intervals(
        rules.causal_intervals(seq_len, window=window, device="cuda"), seq_len
    )


def at_random(seq_len: int, block: int, heads: int = 32) -> Tiles:
    """A tenth of the blocks, another tenth for each head."""
    generator = torch.Generator("cuda").manual_seed(3)
    return rules.random_tiles(seq_len, heads, density=0.1, block=block, generator=generator)


CASES: dict[str, Case] = {
    "s2-32k": s2(32 * K, 64),
    "s2-32k-128": s2(32 * K, 128),
    "s2-128k": s2(128 * K, 64),
    "s2-128k-128": s2(128 * K, 128),
    "documents-64k": Case(lambda: packed(64 * K), 32, 8),
    "window-128k": Case(lambda: plain(128 * K, 4096)),
    "random-32k": Case(lambda: at_random(32 * K, 64), block=64),
    "random-32k-128": Case(lambda: at_random(32 * K, 128)),
    "random-128k": Case(lambda: at_random(128 * K, 64), block=64),
    "random-128k-128": Case(lambda: at_random(128 * K, 128)),
    "causal-32k": Case(lambda: plain(32 * K)),
}
CASES |= {f"s2-128k-stride{n}": s2(128 * K, 64, n) for n in (8, 32, 64, 128, 256)}
