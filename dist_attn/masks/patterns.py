"""Masks of the field by name, composed of rules, each with its source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.layout import FloatArray, IntArray, check_cu_seqlens
from dist_attn.masks.base import Mask
from dist_attn.masks.blocks import BlockList, StridedBlocks, VariableBlockList
from dist_attn.masks.rules import (
    BlockCausal,
    BlockDistance,
    Causal,
    DocumentPrefix,
    Documents,
    Keys,
    PerHead,
    Queries,
    Window,
)

Boundaries = Sequence[int] | IntArray


def causal_documents(cu_seqlens: Boundaries) -> Mask:
    """Packed documents, each causal: the mask of ordinary training."""
    return Causal() & Documents(cu_seqlens)


def sliding_window(tokens: int, num_sinks: int = 0) -> Mask:
    """Each query sees the last `tokens` tokens up to itself, and the first `num_sinks` ones.

    Source: Mistral (arXiv 2310.06825); sinks: StreamingLLM (arXiv 2309.17453).
    """
    window: Mask = Window(tokens - 1, 0)
    return window | (Keys(0, num_sinks) & Causal()) if num_sinks else window


def prefix_lm(prefix_len: int) -> Mask:
    """Causal but for a prefix, which is seen whole. Source: PrefixLM, T5 (arXiv 1910.10683)."""
    return Causal() | Keys(0, prefix_len)


def prefix_lm_documents(cu_seqlens: Boundaries, prefix_lens: Boundaries) -> Mask:
    """Packed documents, each causal but for its own prefix."""
    return causal_documents(cu_seqlens) | DocumentPrefix(cu_seqlens, prefix_lens)


def shared_question(cu_groups: Boundaries, question_lens: Boundaries, cu_parts: Boundaries) -> Mask:
    """Groups of one question and several answers: an answer sees the question and itself.

    Source: FlashMask (arXiv 2410.01359), "share question"; used for preference data.

    Args:
        cu_groups: boundaries of the groups.
        question_lens: tokens of each group's question, which come first.
        cu_parts: boundaries of questions and answers.
    """
    return Causal() & (Documents(cu_parts) | DocumentPrefix(cu_groups, question_lens))


def global_sliding(num_global: int, window: int) -> Mask:
    """A window to both sides, and global tokens that see and are seen by all.

    Source: BigBird (arXiv 2007.14062), Longformer (arXiv 2004.05150).
    """
    return Window(window, window) | Keys(0, num_global) | Queries(0, num_global)


def causal_blockwise(cu_blocks: Boundaries) -> Mask:
    """Causal inside each block; the last block sees everything before it.

    Source: FlashMask (arXiv 2410.01359), "causal blockwise"; in-context examples and a query.
    """
    cu = check_cu_seqlens(cu_blocks)
    if len(cu) < 2:
        raise PlanError(f"causal_blockwise needs one block at least, got {cu.tolist()}")
    return Causal() & (Documents(cu) | Queries(int(cu[-2]), int(cu[-1])))


def block_causal_documents(cu_seqlens: Boundaries, block: int) -> Mask:
    """Packed documents, each cut into blocks that see themselves and those before them.

    Source: MagiAttention's video masks; LongCA-bench (arXiv 2510.17896), "block causal document".
    """
    cu = check_cu_seqlens(cu_seqlens)
    inner = [np.arange(a, b, block) for a, b in itertools.pairwise(cu)]
    boundaries = np.concatenate([np.zeros(1, np.int64), *inner, cu[-1:]])
    return Documents(cu) & BlockCausal(np.unique(boundaries))


def s2(
    seq_len: int, block: int, local_blocks: int, stride_blocks: int, num_heads: int, *,
    dense_heads: Sequence[int] = (), head_shift: int = 1,
) -> Mask:  # fmt: skip
    """S2-Attention: local blocks and a stride that is shifted from head to head.

    Source: S2-Attention (arXiv 2407.17678). Each head sees its own shard of the context; together
    the heads see all of it.

    Args:
        seq_len: tokens of the stream.
        block: tokens of a block.
        local_blocks: blocks a query sees up to and with its own.
        stride_blocks: of the blocks before these, each so manieth is seen.
        num_heads: query heads.
        dense_heads: heads that are plainly causal.
        head_shift: blocks by which the pattern shifts from head to head.
    """
    local = BlockDistance(block, local_blocks - 1, 0)
    strided = StridedBlocks(seq_len, block, stride_blocks, head_shift=head_shift)
    sparse = Causal() & (local | strided)
    if not dense_heads:
        return sparse
    dense = Causal()
    return PerHead(tuple(dense if h in dense_heads else sparse for h in range(num_heads)))


def power_of_two(seq_len: int, block: int, local_blocks: int = 1) -> Mask:
    """Local blocks and blocks at distances 1, 2, 4, ... Source: PowerAttention (arXiv 2503.03588).

    In log2(n) layers every token reaches every other.
    """
    mask: Mask = BlockDistance(block, local_blocks - 1, 0)
    distance = 1
    while distance * block < seq_len:
        if distance >= local_blocks:
            mask = mask | BlockDistance(block, distance)
        distance *= 2
    return Causal() & mask


def shifted_groups(seq_len: int, group: int, num_heads: int, num_sinks: int = 0) -> Mask:
    """Causal groups of tokens; in half of the heads they are shifted by half a group.

    Source: LongLoRA (arXiv 2309.12307); with sinks SinkLoRA (arXiv 2406.05678).
    """
    starts = np.arange(0, seq_len, group)
    halves = np.arange(group // 2, seq_len, group)
    plain, shifted = (
        Causal() & (Documents(np.unique([0, *cuts, seq_len])) | Keys(0, num_sinks))
        for cuts in (starts, halves)
    )
    return PerHead(tuple(plain if h < num_heads // 2 else shifted for h in range(num_heads)))


def anchor_documents(cu_seqlens: Boundaries, num_anchors: int = 1) -> Mask:
    """Packed causal documents that share the first tokens of the stream.

    Source: AnchorAttention (arXiv 2411.13476).
    """
    return Causal() & (Documents(cu_seqlens) | Keys(0, num_anchors))


def streaming_heads(num_heads: int, full_heads: Sequence[int], window: int, sinks: int) -> Mask:
    """Retrieval heads see everything, streaming heads sinks and a window.

    Source: DuoAttention (arXiv 2410.10819).
    """
    full, streaming = Causal(), sliding_window(window, sinks)
    return PerHead(tuple(full if h in full_heads else streaming for h in range(num_heads)))


def window_per_head(windows: Sequence[int], num_sinks: int = 0) -> Mask:
    """A causal window of its own length for each head. Source: MoA (arXiv 2406.14909)."""
    # Heads of one window share their mask, and so their lists.
    by_window = {w: sliding_window(w, num_sinks) for w in windows}
    return PerHead(tuple(by_window[w] for w in windows))


def growing_windows(seq_len: int, spans: Sequence[tuple[int, float]], num_sinks: int = 0) -> Mask:
    """A causal window for each head that grows with the stream: `base + growth * seq_len` tokens.

    Source: MoA (arXiv 2406.14909), elastic rules: a head's span is linear in the input's length.
    """
    windows = [base + round(growth * seq_len) for base, growth in spans]
    if min(windows, default=0) < 1:
        raise PlanError(f"a window holds one token at least, got {windows} of spans {list(spans)}")
    return window_per_head(windows, num_sinks)


def top_blocks(scores: FloatArray, num_chosen: int, block_q: int, block_k: int) -> Mask:
    """Blocks of queries and the blocks of keys that score best for them: dynamic sparsity.

    Combine it with `Causal()`; blocks in the future are to score -inf, and are not chosen then.

    Source: LongCA-bench (arXiv 2510.17896), "uniform block-sparse"; MoBA (arXiv 2502.13189).

    Args:
        scores: float [heads, query blocks, key blocks]; one head's serve all heads.
        num_chosen: key blocks of each query block.
        block_q: tokens of a query block.
        block_k: tokens of a key block.
    """
    return BlockList(block_q, block_k, _best(scores, num_chosen))


def top_variable_blocks(
    scores: FloatArray, num_chosen: int, cu_q: Boundaries, cu_k: Boundaries
) -> Mask:
    """`top_blocks` of blocks with given boundaries.

    Source: LongCA-bench (arXiv 2510.17896), "variable block-sparse".
    """
    blocks = _best(scores, num_chosen)
    return VariableBlockList(check_cu_seqlens(cu_q), check_cu_seqlens(cu_k), blocks)


def _best(scores: FloatArray, num_chosen: int) -> IntArray:
    if scores.ndim != 3 or not num_chosen >= 1:
        raise PlanError(
            f"scores are [heads, query blocks, key blocks] and one block at least is chosen, got "
            f"{scores.shape} and {num_chosen}"
        )
    num_chosen = min(num_chosen, scores.shape[2])
    best = np.argpartition(-scores, num_chosen - 1, axis=2)[:, :, :num_chosen]
    worth = np.take_along_axis(scores, best, axis=2) > -np.inf
    return np.where(worth, best, -1)
