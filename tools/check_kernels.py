"""Runs every block-sparse kernel of this GPU on small masks, twice: made for compute-sanitizer.

    PYTHONPATH=kernels:. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \\
        compute-sanitizer --tool memcheck python tools/check_kernels.py

Forward and backward over windows, S2, random blocks and bit masks, odd lengths, grouped heads and
both head dims. Without torch's caching every tensor is an allocation of its own, so that what lies
beside it is not. Outputs start as NaN; results must be finite and twice the same, bit by bit.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator

import torch

from dist_attn_kernels import rules
from dist_attn_kernels.block_sparse import (
    Backend,
    block_sparse_backward,
    block_sparse_forward,
    why_not_hopper,
)
from dist_attn_kernels.lists import BITS, Tiles, build_lists


def masks() -> Iterator[tuple[str, Tiles, int]]:
    """Name, tiles and query heads a key head."""
    device = "cuda"
    window = rules.causal_intervals(1000, window=150, device=device)
    yield "window", rules.tiles_from_intervals(window, 1000), 2
    yield "s2", rules.s2_tiles(1500, 2, local_blocks=4, stride_blocks=5, device=device), 1
    for length in (1900, 2048):
        generator = torch.Generator(device).manual_seed(length)
        random = rules.random_tiles(length, 3, density=0.12, block=64, generator=generator)
        yield f"random {length}", random, 1
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 64, 2), device=device).to(torch.int32)
    at = torch.arange(20, device=device)
    kinds = torch.full_like(at, BITS)
    yield "bits", Tiles(700, 800, 1, at * 0, at % 11, at % 7, kinds, None, bits), 2


def once(tiles: Tiles, group: int, head_dim: int, backend: Backend) -> list[torch.Tensor]:
    """Results and gradients of one run; the same inputs every time."""
    torch.manual_seed(1)
    kv_heads = tiles.num_mask_heads
    sizes = [(tiles.q_len, kv_heads * group), (tiles.k_len, kv_heads), (tiles.k_len, kv_heads)]
    q, k, v, dout = (
        torch.randn(*size, head_dim, device="cuda", dtype=torch.bfloat16)
        for size in [*sizes, sizes[0]]
    )
    lists = build_lists(tiles)
    out, lse = block_sparse_forward(q, k, v, lists, backend=backend)
    grads = block_sparse_backward(dout, (q, k, v), out, lse, lists, backend=backend)
    return [out, lse, *grads]


def main() -> int:
    """Run everything; 1 if anything is not finite or not repeated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deterministic implementation")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    wrong = 0
    for head_dim in args.head_dims:
        probe = torch.empty(1, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        backend: Backend = "triton" if why_not_hopper(probe) else "hopper"
        for name, tiles, group in masks():
            first, second = (once(tiles, group, head_dim, backend) for _ in range(2))
            out, lse, *grads = first
            finite = all(bool(torch.isfinite(t).all()) for t in (out, *grads))
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            good = finite and same and not bool(torch.isnan(lse).any())
            wrong += not good
            print(f"{name:12} {head_dim:4} {backend:7} {'good' if good else 'WRONG'}", flush=True)
    print("all repeat bit by bit" if not wrong else f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
