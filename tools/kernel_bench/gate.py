"""The correctness check in front of every timing: sampled rows against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_attn_kernels.lists import BITS, BLOCK, FULL, INTERVAL, Tiles


def row_mask(tiles: Tiles, head: int, row: int) -> Tensor:
    """Which keys one query of one mask head sees."""
    seen = torch.zeros(-(-tiles.k_len // BLOCK) * BLOCK, dtype=torch.bool, device="cuda")
    mine = (tiles.heads == head) & (tiles.q_blocks == row // BLOCK)
    for block, kind in zip(tiles.k_blocks[mine].tolist(), tiles.kinds[mine].tolist(), strict=True):
        key = torch.arange(block * BLOCK, block * BLOCK + BLOCK, device="cuda")
        keep = torch.ones_like(key, dtype=torch.bool)
        if kind == INTERVAL:
            assert tiles.intervals is not None
            at = tiles.intervals[head if tiles.intervals.shape[0] > 1 else 0, :, row].tolist()
            keep = (key >= at[0]) & (key < at[1])
        assert kind < BITS
        seen[key] = keep
    return seen[: tiles.k_len]


def column_mask(tiles: Tiles, head: int, key: int) -> Tensor:
    """Which queries see one key of one mask head."""
    seen = torch.zeros(-(-tiles.q_len // BLOCK) * BLOCK, dtype=torch.bool, device="cuda")
    mine = (tiles.heads == head) & (tiles.k_blocks == key // BLOCK)
    full = mine & (tiles.kinds == FULL)
    seen.view(-1, BLOCK)[tiles.q_blocks[full]] = True
    seen = seen[: tiles.q_len]
    if tiles.intervals is not None:
        at = tiles.intervals[head if tiles.intervals.shape[0] > 1 else 0]
        partial = torch.zeros(-(-tiles.q_len // BLOCK), dtype=torch.bool, device="cuda")
        partial[tiles.q_blocks[mine & (tiles.kinds == INTERVAL)]] = True
        inside = (at[0] <= key) & (key < at[1])
        seen = seen | (partial.repeat_interleave(BLOCK)[: tiles.q_len] & inside)
    return seen


def gate(tiles: Tiles, inputs: list[Tensor], results: list[Tensor], samples: int = 6) -> float:
    """The largest relative error of sampled rows of out, dq, dk and dv against float64."""
    q, k, v, dout = inputs
    out, lse, dq, dk, dv = results
    scale, group = q.shape[2] ** -0.5, q.shape[1] // k.shape[1]
    rep = q.shape[1] // tiles.num_mask_heads
    worst = 0.0
    gen = torch.Generator().manual_seed(1)
    for i in range(samples):
        head = int(torch.randint(q.shape[1], (), generator=gen))
        row = int(torch.randint(q.shape[0], (), generator=gen)) if i else q.shape[0] - 1
        kv = head // group
        mask = row_mask(tiles, head // rep, row)
        keys, values = k[mask, kv].double(), v[mask, kv].double()
        scores = keys @ q[row, head].double() * scale
        p = torch.softmax(scores, 0)
        exact = p @ values
        worst = max(worst, rel(out[row, head], exact))
        worst = max(worst, abs(float(lse[head, row]) - float(torch.logsumexp(scores, 0))))
        do = dout[row, head].double()
        ds = p * (values @ do - exact @ do)
        worst = max(worst, rel(dq[row, head], ds @ keys * scale))
    for i in range(samples):
        kv = int(torch.randint(k.shape[1], (), generator=gen))
        key = int(torch.randint(k.shape[0], (), generator=gen)) if i else 0
        want_k = torch.zeros(q.shape[2], dtype=torch.float64, device="cuda")
        want_v = want_k.clone()
        for head in range(kv * group, (kv + 1) * group):
            mask = column_mask(tiles, head // rep, key)
            qs, do = q[mask, head].double(), dout[mask, head].double()
            p = torch.exp(qs @ k[key, kv].double() * scale - lse[head, mask].double())
            ds = p * (do @ v[key, kv].double() - (do * out[mask, head].double()).sum(1))
            want_k += ds @ qs * scale
            want_v += p @ do
        worst = max(worst, rel(dk[key, kv], want_k), rel(dv[key, kv], want_v))
    return worst if math.isfinite(worst) else math.inf


def rel(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values; NaN becomes infinity."""
    value = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-12))
    return value if math.isfinite(value) else math.inf
