"""The masks of LongCA-bench (arXiv 2510.17896): exact, and their lists small at a million tokens.

Its twelve static masks are spelled out here pair by pair from their definitions, and held against
the rules; its two dynamic ones are block-sparse, with equal and with variable blocks.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from dist_attn.errors import PlanError
from dist_attn.masks import (
    BlockList,
    Causal,
    Documents,
    Full,
    Mask,
    Window,
    patterns,
    stretches,
    tile_lists,
)

LENGTHS = (9, 1, 14, 6, 11)
CU = np.concatenate([[0], np.cumsum(LENGTHS)])
SEQ_LEN = int(CU[-1])
DOCUMENT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
IN_DOCUMENT = np.arange(SEQ_LEN) - CU[DOCUMENT]
QUESTION, WINDOW, BLOCK, PREFIX = 9, 4, 4, 5

Pair = Callable[[int, int], bool]


def same(q: int, k: int) -> bool:
    return bool(DOCUMENT[q] == DOCUMENT[k])


#: Name, rule, and when a query may see a key.
STATIC: dict[str, tuple[Mask, Pair]] = {
    "full": (Full(), lambda q, k: True),
    "causal": (Causal(), lambda q, k: k <= q),
    "full document": (Documents(CU), same),
    "causal document": (patterns.causal_documents(CU), lambda q, k: same(q, k) and k <= q),
    "full sliding window": (Window(WINDOW, WINDOW), lambda q, k: abs(q - k) <= WINDOW),
    "causal sliding window": (
        patterns.sliding_window(WINDOW + 1),
        lambda q, k: 0 <= q - k <= WINDOW,
    ),
    # The first document is the question, the others are answers.
    "shared question": (
        patterns.shared_question([0, SEQ_LEN], [QUESTION], CU),
        lambda q, k: k <= q and (same(q, k) or k < QUESTION),
    ),
    "causal blockwise": (
        patterns.causal_blockwise(CU),
        lambda q, k: k <= q and (same(q, k) or bool(DOCUMENT[q] == len(LENGTHS) - 1)),
    ),
    "global sliding": (
        patterns.global_sliding(WINDOW, WINDOW),
        lambda q, k: q < WINDOW or k < WINDOW or abs(q - k) <= WINDOW,
    ),
    "prefix lm causal": (patterns.prefix_lm(PREFIX), lambda q, k: k <= q or k < PREFIX),
    "prefix lm document": (
        patterns.prefix_lm_documents(CU, [PREFIX] * len(LENGTHS)),
        lambda q, k: same(q, k) and (k <= q or bool(IN_DOCUMENT[k] < PREFIX)),
    ),
    "block causal document": (
        patterns.block_causal_documents(CU, BLOCK),
        lambda q, k: same(q, k) and bool(IN_DOCUMENT[k] // BLOCK <= IN_DOCUMENT[q] // BLOCK),
    ),
}


@pytest.mark.parametrize("name", STATIC)
def test_static_masks_are_exact(name: str) -> None:
    mask, pair = STATIC[name]
    want = np.array([[pair(q, k) for k in range(SEQ_LEN)] for q in range(SEQ_LEN)])
    np.testing.assert_array_equal(mask.materialize(SEQ_LEN), want)
    assert mask.area(SEQ_LEN) == want.sum()
    part = stretches(np.arange(SEQ_LEN), 4)
    row, key, full = tile_lists(mask, part, part, 0).expand()
    covered, filled = np.zeros_like(want), np.zeros_like(want)
    for r, k, is_full in zip(row, key, full, strict=True):
        tile = np.s_[r * 4 : r * 4 + 4, k * 4 : k * 4 + 4]
        covered[tile], filled[tile] = True, is_full
    assert not (want & ~covered).any()
    assert not (filled & ~want).any()


def test_there_are_twelve_static_masks_that_differ() -> None:
    pictures = {mask.materialize(SEQ_LEN).tobytes() for mask, _ in STATIC.values()}
    assert len(pictures) == len(STATIC) == 12


def test_dynamic_blocks_of_one_size() -> None:
    scores = np.array([[[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [0.0, -np.inf, 1.0]]])
    mask = patterns.top_blocks(scores, 2, 4, 4)
    blocks = np.kron([[1, 0, 1], [0, 1, 1], [1, 0, 1]], np.ones((4, 4))).astype(bool)
    np.testing.assert_array_equal(mask.materialize(12), blocks)
    # The last blocks may be short.
    np.testing.assert_array_equal(mask.materialize(10), blocks[:10, :10])
    assert mask.area(10) == blocks[:10, :10].sum()
    # Fewer blocks than asked for where the others are ruled out; each head has its own.
    one = patterns.top_blocks(np.stack([scores[0], -scores[0]]), 3, 4, 4)
    assert one.materialize(12, 0)[8].tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert one.materialize(12, 1)[8].all()


def test_dynamic_blocks_of_variable_sizes() -> None:
    scores = np.array([[[0.0, 2.0, 1.0], [5.0, 1.0, 9.0]]])
    cu_q, cu_k = [0, 3, 10], [0, 1, 1, 10]
    mask = patterns.top_variable_blocks(scores, 2, cu_q, cu_k)
    want = np.zeros((10, 10), dtype=bool)
    want[:3, 1:] = True  # the empty block, and the third
    want[3:] = True
    np.testing.assert_array_equal(mask.materialize(10), want)
    assert mask.area(10) == want.sum()


def test_blocks_that_are_not_there_are_refused() -> None:
    with pytest.raises(PlanError, match="ends at query block 1"):
        BlockList(4, 4, np.zeros((1, 2, 1), int)).area(9)
    with pytest.raises(PlanError, match="has 2 heads, head 2"):
        BlockList(4, 4, np.zeros((2, 2, 1), int)).area(8, 2)


MILLION, HEADS = 1 << 20, 32


def masks_of_a_million_tokens() -> dict[str, Mask]:
    """Every mask of the field that has a size, at a million tokens and 32 heads."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.5, 1.4, 4000).astype(int) + 1
    cu = np.append(np.cumsum(lengths)[np.cumsum(lengths) < MILLION], MILLION)
    cu = np.concatenate([[0], cu])
    questions = np.minimum(rng.integers(0, 500, len(cu) - 1), np.diff(cu))
    parts = np.unique(np.concatenate([cu, cu[:-1] + questions, (cu[:-1] + cu[1:]) // 2]))
    num_blocks = MILLION // 128
    p = patterns
    return {
        "full": Full(),
        "causal": Causal(),
        "full documents": Documents(cu),
        "causal documents": p.causal_documents(cu),
        "window": Window(4096, 4096),
        "causal window": p.sliding_window(4096),
        "sinks": p.sliding_window(4096, 16),
        "prefix lm": p.prefix_lm(MILLION // 3),
        "prefix lm documents": p.prefix_lm_documents(cu, questions),
        "shared question": p.shared_question(cu, questions, parts),
        "global sliding": p.global_sliding(1024, 4096),
        "causal blockwise": p.causal_blockwise(cu),
        "block causal documents": p.block_causal_documents(cu, 1024),
        "s2": p.s2(MILLION, 64, 16, 16, HEADS),
        "s2 and dense heads": p.s2(MILLION, 64, 16, 16, HEADS, dense_heads=[0, 9]),
        "power of two": p.power_of_two(MILLION, 128, 4),
        "shifted groups": p.shifted_groups(MILLION, 8192, HEADS, 4),
        "anchor documents": p.anchor_documents(cu, 4),
        "streaming heads": p.streaming_heads(HEADS, [0, 5, 9], 4096, 64),
        "window per head": p.window_per_head([256 << h % 6 for h in range(HEADS)]),
        "listed blocks": BlockList(128, 128, rng.integers(0, num_blocks, (HEADS, num_blocks, 8))),
    }


MILLIONS = masks_of_a_million_tokens()


def lists_of_32_heads(mask: Mask) -> tuple[float, int]:
    """CPU seconds of the lists of all heads, and their bytes."""
    part = stretches(np.arange(MILLION), 128)
    start = time.process_time()
    lists = {mask.pattern(h): tile_lists(mask, part, part, h) for h in range(HEADS)}
    return time.process_time() - start, sum(table.nbytes() for table in lists.values())


@pytest.mark.parametrize("name", MILLIONS)
def test_lists_of_a_million_tokens_and_32_heads(name: str) -> None:
    mask = MILLIONS[name]
    for _ in range(3):  # the machine may be busy
        elapsed, num_bytes = lists_of_32_heads(mask)
        if elapsed < 1.0:
            break
    assert elapsed < 1.0
    # A byte for every tile of one head's square would be 64 MiB, for 32 heads 2 GiB.
    assert num_bytes < 64 << 20
    part = stretches(np.arange(MILLION), 128)
    tracemalloc.start()
    tile_lists(mask, part, part, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
