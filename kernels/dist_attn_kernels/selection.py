"""Tiles that the queries and keys choose themselves: block top-k, and top-k over permuted keys.

The choice is not differentiable; attention over what was chosen is. Both work in blocks of 64
tokens and return `Tiles` with one mask head per key/value head, shared by its query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn_kernels.lists import BITS, BLOCK, EMPTY, FULL, Tiles, num_blocks
from dist_attn_kernels.rules import block_bounds, causal_intervals, classify

#: Query blocks whose scores against all key blocks exist at a time.
BLOCKS_AT_A_TIME = 256
#: Tiles whose elements exist at a time.
TILES_AT_A_TIME = 4096


def topk_tiles(
    q_THD: Tensor,
    k_TKD: Tensor,
    *,
    top_k: int,
    local_blocks: int = 1,
    cu_seqlens: Tensor | None = None,
) -> Tiles:
    """Each query block sees its own, the `local_blocks` - 1 before, and the `top_k` best earlier.

    A block's score is the product of mean query and mean key, summed over the query heads of a
    key/value head. Causal, inside documents.

    Args:
        q_THD: [tokens, heads, head_dim].
        k_TKD: [tokens, kv_heads, head_dim].
        top_k: blocks beside the local ones.
        local_blocks: at least 1.
        cu_seqlens: document boundaries, int [docs + 1].

    Source: MoBA (Lu et al. 2025, arXiv:2502.13189), which chooses per query; here a block of 64
        queries chooses together.
    """
    _check(q_THD, k_TKD, top_k, local_blocks)
    tokens, kv_heads = q_THD.shape[0], k_TKD.shape[1]
    intervals = causal_intervals(tokens, cu_seqlens=cu_seqlens, device=q_THD.device)
    first = block_bounds(intervals, tokens)[0][0, 0] // BLOCK
    pooled_q, pooled_k = _pooled_queries(q_THD, kv_heads), _pooled(k_TKD)
    parts = []
    for start in range(0, num_blocks(tokens), BLOCKS_AT_A_TIME):
        q_block = torch.arange(
            start, min(start + BLOCKS_AT_A_TIME, num_blocks(tokens)), device=q_THD.device
        )
        k_block = torch.arange(int(q_block[-1]) + 1, device=q_THD.device)
        near = q_block[:, None] - k_block < local_blocks
        seen = (k_block <= q_block[:, None]) & (k_block >= first[q_block, None])
        chosen = _best(pooled_q[:, q_block], pooled_k[:, k_block], seen & ~near, top_k)
        head, q_at, k_at = (chosen | (near & seen)).nonzero(as_tuple=True)
        parts.append(torch.stack([head, q_at + start, k_at]))
    head, q_at, k_at = torch.cat(parts, 1)
    full = torch.full_like(head, FULL)
    return classify(Tiles(tokens, tokens, kv_heads, head, q_at, k_at, full, intervals))


def permuted_topk(
    q_THD: Tensor, k_TKD: Tensor, *, top_k: int, segment_blocks: int = 4
) -> tuple[Tensor, Tiles]:
    """A permutation of the keys inside segments that gathers the weighty ones, and tiles for it.

    Keys are sorted inside each whole segment by the weight that the last 64 queries give them, so
    that a few blocks hold most of it. A query block sees its own segment exactly (causal, cut by
    bit masks) and the `top_k` best blocks of earlier segments.

    Args:
        q_THD: [tokens, heads, head_dim].
        k_TKD: [tokens, kv_heads, head_dim].
        top_k: blocks of earlier segments.
        segment_blocks: blocks of 64 in a segment; tokens behind the last whole segment stay.

    Returns:
        order int64 [tokens, kv_heads], row i of the permuted keys is token order[i]; and the tiles
        for `permute_keys(k, order)` and `permute_keys(v, order)`.

    Source: permuted block-sparse attention (Wang et al. 2025, arXiv:2510.21270); here keys alone
        are permuted, in one causal document.
    """
    _check(q_THD, k_TKD, top_k, 1)
    tokens, kv_heads = q_THD.shape[0], k_TKD.shape[1]
    segment = segment_blocks * BLOCK
    order = _by_weight(q_THD, k_TKD, segment)
    pooled_q = _pooled_queries(q_THD, kv_heads)
    pooled_k = _pooled(permute_keys(k_TKD, order))
    q_block = torch.arange(num_blocks(tokens), device=q_THD.device)
    own = q_block[:, None] // segment_blocks == q_block // segment_blocks
    earlier = q_block[:, None] // segment_blocks > q_block // segment_blocks
    chosen = _best(pooled_q, pooled_k, earlier, top_k)
    head, q_at, k_at = chosen.nonzero(as_tuple=True)
    near = own.expand(kv_heads, -1, -1).nonzero(as_tuple=True)
    bits, kinds = _causal_bits(near, order, tokens)
    keep = kinds != EMPTY
    return order, Tiles(
        tokens,
        tokens,
        kv_heads,
        heads=torch.cat([head, near[0][keep]]),
        q_blocks=torch.cat([q_at, near[1][keep]]),
        k_blocks=torch.cat([k_at, near[2][keep]]),
        kinds=torch.cat([torch.full_like(head, FULL), kinds[keep]]),
        bits=bits,
    )


def permute_keys(t_TKD: Tensor, order_TK: Tensor) -> Tensor:
    """Row i of each head is row order[i] of that head; differentiable."""
    return t_TKD.gather(0, order_TK.unsqueeze(-1).expand_as(t_TKD))


def _check(q: Tensor, k: Tensor, top_k: int, local_blocks: int) -> None:
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q and k must have one length and head_dim, heads a multiple of kv_heads; "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if top_k < 0 or local_blocks < 1:
        raise ValueError(
            f"top_k must be >= 0 and local_blocks >= 1, got {top_k} and {local_blocks}"
        )


def _pooled(t: Tensor) -> Tensor:
    """Mean of each block, float32 [heads, blocks, head_dim]; the last one over what it holds."""
    length = t.shape[0]
    wide = torch.nn.functional.pad(t.detach().float(), (0, 0, 0, 0, 0, -length % BLOCK))
    sums = wide.view(-1, BLOCK, *t.shape[1:]).sum(1)
    start = torch.arange(sums.shape[0], device=t.device) * BLOCK
    return (sums / (length - start).clamp(max=BLOCK)[:, None, None]).transpose(0, 1)


def _pooled_queries(q: Tensor, kv_heads: int) -> Tensor:
    """Block means summed over the query heads of each key/value head."""
    pooled = _pooled(q)
    return pooled.view(kv_heads, -1, *pooled.shape[1:]).sum(1)


def _best(pooled_q: Tensor, pooled_k: Tensor, allowed: Tensor, top_k: int) -> Tensor:
    """The `top_k` best allowed blocks of every query block, bool [heads, q blocks, k blocks]."""
    scores = pooled_q @ pooled_k.transpose(1, 2)
    scores = scores.masked_fill(~allowed, float("-inf"))
    best = scores.topk(min(top_k, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & allowed


def _by_weight(q: Tensor, k: Tensor, segment: int) -> Tensor:
    tokens, kv_heads, dim = k.shape
    last = q[-BLOCK:].detach().float().unflatten(1, (kv_heads, -1))
    scores = torch.einsum("qkgd,tkd->kgqt", last, k.detach().float()) * dim**-0.5
    position = torch.arange(tokens, device=k.device)
    scores = scores.masked_fill(position > position[-BLOCK:, None], float("-inf"))
    weight = torch.softmax(scores, -1).sum((1, 2)).t()
    order = position[:, None].expand(-1, kv_heads).clone()
    whole = tokens // segment * segment
    inside = weight[:whole].view(-1, segment, kv_heads).argsort(dim=1, descending=True, stable=True)
    start = torch.arange(0, whole, segment, device=k.device)[:, None, None]
    order[:whole] = (inside + start).view(whole, kv_heads)
    return order


def _causal_bits(tiles: tuple[Tensor, ...], order: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Bit masks of tiles whose keys are permuted, and kinds: EMPTY, or the number of a mask."""
    inside = torch.arange(BLOCK, device=order.device)
    shift = torch.arange(32, device=order.device)
    words, used = [], []
    for head, q_block, k_block in zip(*(t.split(TILES_AT_A_TIME) for t in tiles), strict=True):
        query = q_block[:, None] * BLOCK + inside
        place = k_block[:, None] * BLOCK + inside
        key = order[place.clamp(max=tokens - 1), head[:, None]]
        key = torch.where(place < tokens, key, tokens)
        seen = (key[:, None, :] <= query[:, :, None]) & (query < tokens)[:, :, None]
        word = (seen.view(-1, BLOCK, 2, 32).to(torch.int64) << shift).sum(-1)
        words.append(torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32))
        used.append(seen.flatten(1).any(1))
    kinds = BITS + torch.arange(tiles[0].numel(), device=order.device)
    return torch.cat(words), torch.where(torch.cat(used), kinds, EMPTY)
