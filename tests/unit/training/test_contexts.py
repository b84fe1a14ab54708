"""Streams of equal documents share their masks; others do not."""

from __future__ import annotations

import numpy as np
import torch

from dist_attn.data import LocalBatch
from dist_attn.layout import make_layout
from dist_attn.masks import Mask
from dist_attn.training.contexts import Stream, Streams


def batch_of(lengths: tuple[int, ...], kind: str = "zigzag", degree: int = 2) -> LocalBatch:
    cu = np.concatenate([[0], np.cumsum(lengths)])
    row = torch.zeros(1, 1, dtype=torch.int64)
    return LocalBatch(
        row, row, row, row, None, torch.from_numpy(cu.astype(np.int32)), max(lengths),
        make_layout(kind, cu, degree), 0, "ring", 0, 1,
    )  # fmt: skip


def masks_of(stream: Stream) -> list[Mask]:
    return list(stream.masks)


def test_equal_streams_are_one_object() -> None:
    streams = Streams(None, capacity=2)
    first = streams.of(batch_of((8, 4)))
    assert streams.of(batch_of((8, 4))) is first
    for other in (batch_of((4, 8)), batch_of((8, 4), "contiguous"), batch_of((8, 4), degree=1)):
        assert streams.of(other) is not first
    # Two others came since it was last asked for.
    again = streams.of(batch_of((8, 4)))
    assert again is not first
    streams.forget()
    assert streams.of(batch_of((8, 4))) is not again
    assert len(masks_of(first)) == 1
