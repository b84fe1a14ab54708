"""Masks of the field as tiles: documents, windows, sinks, S2 and random blocks.

Each function returns `Tiles` for `build_lists`. Everything is integer arithmetic on torch tensors
of the size of the result, on the device that is asked for.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dist_attn_kernels.lists import BITS, BLOCK, EMPTY, FULL, INTERVAL, Tiles, num_blocks


def causal_intervals(
    q_len: int,
    *,
    offset: int = 0,
    cu_seqlens: Tensor | None = None,
    window: int = -1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Per query the keys [lo, hi) that a causal rule lets it see, int32 [1, 2, q_len].

    Args:
        q_len: queries.
        offset: the first query's position among the keys (a ring step's distance).
        cu_seqlens: document boundaries of the keys, int [docs + 1]; by default one document.
        window: keys to the left of the query that it still sees; -1: all.
        device: where the tensor goes.
    """
    position = torch.arange(q_len, device=device) + offset
    low = torch.zeros_like(position)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(device=device, dtype=torch.int64)
        # Empty documents share their boundary with the next one; the last start at or before wins.
        low = ends[torch.searchsorted(ends, position, right=True).clamp(min=1) - 1]
    if window >= 0:
        low = torch.maximum(low, position - window)
    high = (position + 1).clamp(min=0)
    return torch.stack([low.clamp(min=0), high]).unsqueeze(0).to(torch.int32)


def tiles_from_intervals(intervals: Tensor, k_len: int) -> Tiles:
    """Every tile that some query's interval touches."""
    heads, _, q_len = intervals.shape
    low, high = block_bounds(intervals, k_len)
    first, last = low[..., 0, :] // BLOCK, -(-high[..., 1, :] // BLOCK)
    if intervals.shape[1] == 4:
        merged = merge_runs(first, last, low[..., 2, :] // BLOCK, -(-high[..., 3, :] // BLOCK))
        first, last = torch.cat([m[0] for m in merged], -1), torch.cat([m[1] for m in merged], -1)
    counts = (last - first).clamp(min=0).flatten()
    item = torch.repeat_interleave(counts)
    inside = (
        torch.arange(item.numel(), device=item.device) - (torch.cumsum(counts, 0) - counts)[item]
    )
    blocks = num_blocks(q_len)
    per_head = first.shape[-1]
    head, q_block = item // per_head, item % per_head % blocks
    k_block = first.flatten()[item] + inside
    return classify(
        Tiles(q_len, k_len, heads, head, q_block, k_block, torch.full_like(head, FULL), intervals)
    )


def merge_runs(
    first: Tensor, last: Tensor, other_first: Tensor, other_last: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Two runs of blocks a query block as two that do not overlap."""
    swap = other_first < first
    a0, a1 = torch.where(swap, other_first, first), torch.where(swap, other_last, last)
    b0, b1 = torch.where(swap, first, other_first), torch.where(swap, last, other_last)
    return [(a0, a1), (torch.maximum(b0, a1), b1)]


def block_bounds(intervals: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
    """Per query block the smallest and largest of each interval bound, [heads, bounds, blocks].

    An empty interval counts as no bound; a block whose intervals are all empty gets low >= high.
    """
    heads, bounds, q_len = intervals.shape
    wide = intervals.to(torch.int64).clamp(0, k_len)
    low, high = wide.clone(), wide.clone()
    for i in range(0, bounds, 2):
        empty = wide[:, i] >= wide[:, i + 1]
        low[:, i] = torch.where(empty, k_len, wide[:, i])
        high[:, i + 1] = torch.where(empty, 0, wide[:, i + 1])
    pad = num_blocks(q_len) * BLOCK - q_len
    low = torch.nn.functional.pad(low, (0, pad), value=k_len)
    high = torch.nn.functional.pad(high, (0, pad), value=0)
    shape = (heads, bounds, -1, BLOCK)
    return low.view(shape).amin(-1), high.view(shape).amax(-1)


def classify(tiles: Tiles) -> Tiles:
    """Cut FULL tiles by the intervals: drop those outside, mark those that need a mask."""
    intervals = tiles.intervals
    if intervals is None:
        return tiles
    low, high = block_bounds(intervals, tiles.k_len)
    pad = num_blocks(tiles.q_len) * BLOCK - tiles.q_len
    shape = (*intervals.shape[:2], -1, BLOCK)
    wide = intervals.to(torch.int64)
    most = torch.nn.functional.pad(wide, (0, pad), value=0).view(shape).amax(-1)
    least = torch.nn.functional.pad(wide, (0, pad), value=1 << 40).view(shape).amin(-1)
    head = tiles.heads if intervals.shape[0] > 1 else torch.zeros_like(tiles.heads)
    begin = tiles.k_blocks * BLOCK
    end = begin + BLOCK
    touched = torch.zeros_like(begin, dtype=torch.bool)
    whole = torch.zeros_like(touched)
    for i in range(0, intervals.shape[1], 2):
        at = (head, i, tiles.q_blocks)
        to = (head, i + 1, tiles.q_blocks)
        touched |= (low[at] < end) & (high[to] > begin)
        whole |= (most[at] <= begin) & (least[to] >= end)
    kinds = torch.where(tiles.kinds == FULL, torch.where(whole, FULL, INTERVAL), tiles.kinds)
    kinds = torch.where(touched | (tiles.kinds > INTERVAL), kinds, EMPTY)
    keep = kinds != EMPTY
    return dataclasses.replace(
        tiles,
        heads=tiles.heads[keep],
        q_blocks=tiles.q_blocks[keep],
        k_blocks=tiles.k_blocks[keep],
        kinds=kinds[keep],
    )


def s2_tiles(
    seq_len: int,
    heads: int,
    *,
    local_blocks: int,
    stride_blocks: int,
    block: int = BLOCK,
    cu_seqlens: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tiles:
    """S2: each head its own shard of the context.

    Head h lets a query block see the last `local_blocks` key blocks (its own included) and every
    key block b with (b + h) % stride_blocks == stride_blocks - 1, always causally and, with
    `cu_seqlens`, inside the query's document.

    Source: S2-Attention (Lin et al. 2024, arXiv:2407.17678), local blocks and a vertical stride
        that is shifted per head; blocks are counted from the start of the packed stream.
    """
    if block not in (BLOCK, 2 * BLOCK):
        raise ValueError(f"block must be {BLOCK} or {2 * BLOCK}, got {block}")
    num = -(-seq_len // block)
    q = torch.arange(num, device=device)
    first_local = (q - local_blocks + 1).clamp(min=0)
    parts = []
    for head in range(heads):
        residue = (stride_blocks - 1 - head) % stride_blocks
        num_strided = ((first_local - residue + stride_blocks - 1) // stride_blocks).clamp(min=0)
        counts = q - first_local + 1 + num_strided
        item = torch.repeat_interleave(counts)
        inside = (
            torch.arange(item.numel(), device=device) - (torch.cumsum(counts, 0) - counts)[item]
        )
        strided = inside < num_strided[item]
        local = first_local[item] + inside - num_strided[item]
        k = torch.where(strided, residue + inside * stride_blocks, local)
        parts.append(torch.stack([torch.full_like(item, head), item, k]))
    head_q_k = torch.cat(parts, 1)
    coords = split_blocks(head_q_k, block // BLOCK, (num_blocks(seq_len), num_blocks(seq_len)))
    intervals = causal_intervals(seq_len, cu_seqlens=cu_seqlens, device=device)
    full = torch.full_like(coords[0], FULL)
    return classify(Tiles(seq_len, seq_len, heads, *coords, full, intervals))


def random_tiles(
    seq_len: int, heads: int, *, density: float, block: int, generator: torch.Generator
) -> Tiles:
    """Causal random block masks, one a head; the diagonal is always listed."""
    num = -(-seq_len // block)
    device = generator.device
    parts = []
    for head in range(heads):
        chosen = torch.rand(num, num, generator=generator, device=device) < density
        chosen = chosen.tril() | torch.eye(num, dtype=torch.bool, device=device)
        q, k = chosen.nonzero(as_tuple=True)
        parts.append(torch.stack([torch.full_like(q, head), q, k]))
    coords = split_blocks(torch.cat(parts, 1), block // BLOCK, (num_blocks(seq_len),) * 2)
    full = torch.full_like(coords[0], FULL)
    intervals = causal_intervals(seq_len, device=device)
    return classify(Tiles(seq_len, seq_len, heads, *coords, full, intervals))


def split_blocks(
    head_q_k: Tensor, ratio: int, limits: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of blocks `ratio` times as wide as coordinates of blocks of 64."""
    head, q, k = head_q_k
    if ratio == 1:
        return head, q, k
    step = torch.arange(ratio, device=head.device)
    q = (q[:, None, None] * ratio + step[:, None]).expand(-1, ratio, ratio).flatten()
    k = (k[:, None, None] * ratio + step).expand(-1, ratio, ratio).flatten()
    head = head[:, None].expand(-1, ratio * ratio).flatten()
    keep = (q < limits[0]) & (k < limits[1])
    return head[keep], q[keep], k[keep]


def dense_mask(tiles: Tiles) -> Tensor:
    """The mask element by element, bool [mask heads, q_len, k_len]: for tests and pictures."""
    q_blocks, k_blocks = num_blocks(tiles.q_len), num_blocks(tiles.k_len)
    kinds = torch.zeros(tiles.num_mask_heads, q_blocks, k_blocks, dtype=torch.int64)
    at = [t.cpu().to(torch.int64) for t in (tiles.heads, tiles.q_blocks, tiles.k_blocks)]
    kinds[tuple(at)] = tiles.kinds.cpu().to(torch.int64)
    wide = kinds.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    key = torch.arange(k_blocks * BLOCK)
    seen = torch.ones(1, q_blocks * BLOCK, k_blocks * BLOCK, dtype=torch.bool)
    if tiles.intervals is not None:
        pad = (0, q_blocks * BLOCK - tiles.q_len)
        bounds = torch.nn.functional.pad(tiles.intervals.cpu(), pad).unsqueeze(-1)
        seen = (key >= bounds[:, 0]) & (key < bounds[:, 1])
        if bounds.shape[1] == 4:
            seen = seen | ((key >= bounds[:, 2]) & (key < bounds[:, 3]))
    mask = (wide == FULL) | ((wide == INTERVAL) & seen)
    if tiles.bits is not None:
        words = tiles.bits.cpu().to(torch.int64)
        bit = (words.unsqueeze(-1) >> torch.arange(32)) & 1
        bit = bit.reshape(-1, BLOCK, BLOCK).bool()
        for h, q, k in (kinds > INTERVAL).nonzero().tolist():
            rows, cols = slice(q * BLOCK, (q + 1) * BLOCK), slice(k * BLOCK, (k + 1) * BLOCK)
            mask[h, rows, cols] = bit[int(kinds[h, q, k]) - 3]
    return mask[:, : tiles.q_len, : tiles.k_len]


def area(tiles: Tiles) -> Tensor:
    """Scores that count, per mask head, int64 [mask heads]; exact."""
    height = (tiles.q_len - tiles.q_blocks.to(torch.int64) * BLOCK).clamp(max=BLOCK)
    count = torch.where(tiles.kinds == FULL, height * BLOCK, 0)
    rows = torch.arange(BLOCK, device=tiles.heads.device)
    partial = (tiles.kinds == INTERVAL).nonzero().squeeze(1)
    if tiles.intervals is not None:
        # A few thousand tiles at a time: 64 rows of each are looked at.
        for part in partial.split(1 << 16):
            row = tiles.q_blocks[part, None].to(torch.int64) * BLOCK + rows
            head = (
                tiles.heads[part, None] if tiles.intervals.shape[0] > 1 else torch.zeros_like(row)
            )
            at = tiles.intervals.transpose(1, 2)[
                head.expand_as(row), row.clamp(max=tiles.q_len - 1)
            ]
            begin = tiles.k_blocks[part, None, None].to(torch.int64) * BLOCK
            # Clamping to the tile keeps the pairs' order; an empty pair comes out as no keys.
            bounds = torch.minimum(torch.maximum(at.to(torch.int64), begin), begin + BLOCK)
            bounds = torch.minimum(bounds, torch.full_like(bounds, tiles.k_len))
            seen = (bounds[..., 1] - bounds[..., 0]).clamp(min=0)
            if bounds.shape[-1] == 4:
                seen += (bounds[..., 3] - bounds[..., 2]).clamp(min=0)
                both = torch.minimum(bounds[..., 1], bounds[..., 3])
                seen -= (both - torch.maximum(bounds[..., 0], bounds[..., 2])).clamp(min=0)
            count[part] = (seen * (row < tiles.q_len)).sum(1)
    if tiles.bits is not None:
        for part in (tiles.kinds > INTERVAL).nonzero().squeeze(1).split(1 << 12):
            words = tiles.bits[tiles.kinds[part].to(torch.int64) - BITS].unsqueeze(-1)
            ones = ((words >> torch.arange(32, device=words.device)) & 1).flatten(2)
            col = torch.arange(BLOCK, device=words.device)
            ones = ones * (rows < height[part, None]).unsqueeze(-1)
            width = tiles.k_len - tiles.k_blocks[part].to(torch.int64) * BLOCK
            count[part] = (ones * (col < width[:, None]).unsqueeze(1)).sum((1, 2))
    total = torch.zeros(tiles.num_mask_heads, dtype=torch.int64, device=count.device)
    return total.index_add_(0, tiles.heads.to(torch.int64), count)
