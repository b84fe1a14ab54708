"""Every mask of the field over one odd stream, for tests that must hold for all of them."""

from __future__ import annotations

import numpy as np

from dist_attn.masks import BlockList, Causal, Documents, Full, Mask, Predicate, Window, patterns

SEQ_LEN = 89
NUM_HEADS = 4
CU = np.array([0, 7, 7, 8, 49, 67, 68, 89])


def _random_blocks() -> BlockList:
    rng = np.random.default_rng(0)
    q_blocks, k_blocks = -(-SEQ_LEN // 8), -(-SEQ_LEN // 16)
    listed = rng.integers(-1, k_blocks, (NUM_HEADS, q_blocks, 3))
    listed[:, 2] = -1  # these queries have no keys
    return BlockList(8, 16, listed)


def _scores(num_k_blocks: int) -> np.ndarray:
    """Of 12 query blocks for key blocks of about equal size: none in the future."""
    scores = np.random.default_rng(1).random((NUM_HEADS, 12, num_k_blocks))
    future = np.arange(num_k_blocks) * 12 > (np.arange(12)[:, None] + 1) * num_k_blocks
    return np.where(future, -np.inf, scores)


def zoo() -> dict[str, Mask]:
    """Masks over SEQ_LEN tokens and NUM_HEADS query heads."""
    p = patterns
    return {
        "full": Full(),
        "causal": Causal(),
        "full window": Window(9, 5),
        "causal window": p.sliding_window(13),
        "window and sinks": p.sliding_window(13, 3),
        "half-open window": Window(-1, 4),
        "full documents": Documents(CU),
        "causal documents": p.causal_documents(CU),
        "documents and window": p.causal_documents(CU) & Window(6, 0),
        "prefix lm": p.prefix_lm(30),
        "prefix lm documents": p.prefix_lm_documents(CU, [3, 0, 1, 20, 18, 1, 2]),
        "shared question": p.shared_question([0, 49, 89], [10, 5], [0, 10, 22, 49, 54, 70, 89]),
        "global sliding": p.global_sliding(5, 8),
        "causal blockwise": p.causal_blockwise(CU),
        "block causal documents": p.block_causal_documents(CU, 6),
        "s2": p.s2(SEQ_LEN, 4, 2, 3, NUM_HEADS),
        "s2 and a dense head": p.s2(SEQ_LEN, 4, 2, 3, NUM_HEADS, dense_heads=[1]),
        "s2 in documents": p.s2(SEQ_LEN, 4, 2, 3, NUM_HEADS) & Documents(CU),
        "power of two": p.power_of_two(SEQ_LEN, 4, 2),
        "shifted groups": p.shifted_groups(SEQ_LEN, 20, NUM_HEADS, 2),
        "anchor documents": p.anchor_documents(CU, 2),
        "streaming heads": p.streaming_heads(NUM_HEADS, [0, 2], 11, 4),
        "window per head": p.window_per_head([3, 7, 15, 90]),
        "growing windows": p.growing_windows(SEQ_LEN, [(3, 0.0), (7, 0.1), (2, 0.5), (1, 1.0)], 2),
        "listed blocks": _random_blocks(),
        "listed blocks, causal": _random_blocks() & Causal(),
        "top blocks": p.top_blocks(_scores(6), 2, 8, 16) & Causal(),
        "top variable blocks": p.top_variable_blocks(
            _scores(7), 2, [0, 3, 3, 9, 20, 21, 30, 41, 55, 60, 72, 80, 89], CU
        ),
        "predicate": Predicate(lambda q, k, h: (q * 7 + k * 3 + h) % 5 < 2, Window(40, 0)),
        "predicate or window": Predicate(lambda q, k, h: (q + k) % 3 == 0, Causal()) | Window(3, 3),
    }
