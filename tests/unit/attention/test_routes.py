"""Which rank needs whose keys, and how far a ring carries them, against the mask itself."""

from __future__ import annotations

import numpy as np
import pytest

from dist_attn.attention.ring import NOBODY, route
from dist_attn.attention.workload import Workload
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Mask, patterns
from tests.mask_zoo import CU, NUM_HEADS, SEQ_LEN, zoo

MASKS = {**zoo(), "dense causal": Causal(), "dense documents": patterns.causal_documents(CU)}
HEADS = tuple(range(NUM_HEADS))


def needs_of(mask: Mask, layout_kind: str, cp_size: int) -> tuple[np.ndarray, Workload]:
    layout = make_layout(layout_kind, CU, cp_size)
    allowed = np.any([mask.materialize(SEQ_LEN, h) for h in HEADS], axis=0)
    positions = [layout.positions(r) for r in range(cp_size)]
    truth = [[bool(allowed[np.ix_(q, k)].any()) for k in positions] for q in positions]
    return np.array(truth), Workload(mask, layout, 0, HEADS, 2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("layout_kind", ["contiguous", "zigzag", "balanced"])
def test_needs_are_those_of_the_mask(name: str, layout_kind: str) -> None:
    truth, work = needs_of(MASKS[name], layout_kind, 8)
    # A function is unknown until it is asked: there the mask around it counts.
    if MASKS[name].exact_rows:
        np.testing.assert_array_equal(work.needs, truth)
    else:
        assert (work.needs | ~truth).all()


@pytest.mark.parametrize("inner_size", [8, 4, 2])
@pytest.mark.parametrize("name", ["causal window", "causal documents", "shared question", "s2"])
def test_a_block_goes_no_farther_than_the_last_rank_that_needs_it(
    name: str, inner_size: int
) -> None:
    truth, work = needs_of(MASKS[name], "contiguous", 8)
    for source in range(8):
        node, place = divmod(source, inner_size)
        for a, (first, last) in enumerate(route(work, source, inner_size).rounds):
            start = (node + a) % (8 // inner_size) * inner_size
            ranks = [start + (place + b) % inner_size for b in range(inner_size)]
            needing = [b for b, r in enumerate(ranks) if truth[r, source] and r != source]
            assert (first, last) == ((needing[0], needing[-1]) if needing else NOBODY)
