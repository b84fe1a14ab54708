"""Masks, inputs and the float64 reference that the block-sparse tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn_kernels import rules
from dist_attn_kernels.lists import BITS, FULL, INTERVAL, Tiles, num_blocks


def random_mixed_tiles(q_len: int, k_len: int, heads: int, seed: int, pairs: int = 1) -> Tiles:
    """Every kind of tile at random, some rows and columns without any."""
    gen = torch.Generator().manual_seed(seed)
    num_q, num_k = num_blocks(q_len), num_blocks(k_len)
    kinds = torch.randint(0, BITS + 3, (heads, num_q, num_k), generator=gen)
    kinds[:, num_q // 2] = 0
    kinds[0, :, 0] = 0
    last = kinds[..., -1]
    if k_len % 64:
        # What reaches past the keys must not be called full.
        last[last == FULL] = INTERVAL
    head, q, k = kinds.nonzero(as_tuple=True)
    bounds = torch.randint(
        0, k_len + 1, (heads, 2 * pairs, q_len), generator=gen, dtype=torch.int32
    )
    bits = torch.randint(-(2**31), 2**31 - 1, (3, 64, 2), generator=gen).to(torch.int32)
    return Tiles(q_len, k_len, heads, head, q, k, kinds[head, q, k], bounds, bits)


def thinned(tiles: Tiles, share: float) -> Tiles:
    """Some of the tiles, at random: neighbouring blocks have little in common."""
    gen = torch.Generator().manual_seed(tiles.heads.numel())
    keep = torch.rand(tiles.heads.numel(), generator=gen) < share
    parts = (t[keep] for t in (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds))
    sizes = (tiles.q_len, tiles.k_len, tiles.num_mask_heads)
    return Tiles(*sizes, *parts, tiles.intervals, tiles.bits)


def qkv(
    tiles: Tiles, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """Fresh random q, k, v and the gradients of out and lse."""
    shapes = [(tiles.q_len, heads), (tiles.k_len, kv_heads), (tiles.k_len, kv_heads)]
    out = [torch.randn(n, h, dim, device=device, dtype=dtype) for n, h in shapes]
    out.append(torch.randn(tiles.q_len, heads, dim, device=device, dtype=dtype))
    out.append(torch.randn(heads, tiles.q_len, device=device))
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention by definition, in the dtype of its inputs; returns out [T, H, D] and lse [H, T]."""
    group = q.shape[1] // k.shape[1]
    mask = mask.to(q.device).repeat_interleave(q.shape[1] // mask.shape[0], 0)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores.float() if scores.dtype != torch.float64 else scores, -1)
    safe = torch.where(mask.any(-1), lse, torch.zeros_like(lse))
    probs = torch.exp(scores - safe.unsqueeze(-1)).to(v.dtype)
    out = torch.einsum("hqk,khd->qhd", probs, v.repeat_interleave(group, 1))
    return out, lse


def gradients(
    inputs: list[Tensor], mask: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the gradients of q, k, v by autograd at `dtype`."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs[:3])
    out, lse = attend(q, k, v, mask, scale)
    live = torch.isfinite(lse)
    lse_part = (torch.where(live, lse, 0.0) * inputs[4].to(lse.dtype)).sum()
    loss = (out * inputs[3].to(dtype)).sum().to(lse.dtype) + lse_part
    return out.detach(), lse.detach(), list(torch.autograd.grad(loss, [q, k, v]))


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact values; NaN never passes a comparison."""
    return float((got.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def named_tiles(name: str, seq_len: int, heads: int) -> Tiles:
    """One of the masks by name."""
    cu = torch.tensor([0, 5, 5, seq_len // 3, seq_len // 2 + 1, seq_len])
    mixed = random_mixed_tiles(seq_len, seq_len, heads, seed=seq_len)
    generator = torch.Generator().manual_seed(seq_len)
    bounds = {
        "causal": {},
        "window": {"window": 100},
        "documents": {"cu_seqlens": cu},
    }  # fmt: skip
    if name in bounds:
        intervals = rules.causal_intervals(seq_len, **bounds[name])  # type: ignore[arg-type]
        return rules.tiles_from_intervals(intervals, seq_len)
    match name:
        case "s2":
            return rules.s2_tiles(seq_len, heads, local_blocks=2, stride_blocks=3)
        case "s2_128_documents":
            return rules.s2_tiles(
                seq_len, heads, local_blocks=1, stride_blocks=2, block=128, cu_seqlens=cu
            )
        case "random":
            return rules.random_tiles(seq_len, heads, density=0.3, block=64, generator=generator)
        case "mixed":
            return mixed
        case "sparse":
            return thinned(mixed, 0.2)
    raise AssertionError(name)
