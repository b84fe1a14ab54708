"""Streams of equal documents share their masks; others do not."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch

from dist_attn.config import Config
from dist_attn.data import LocalBatch
from dist_attn.layout import make_layout
from dist_attn.masks import Mask
from dist_attn.planner.plan import Group
from dist_attn.training import contexts
from dist_attn.training.contexts import Lists, Stream, Streams
from dist_attn.training.topology import Topology


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


def test_lists_of_a_stream_that_is_worked_on_are_left_to_the_work() -> None:
    """Two threads would else make the same lists at once, and one read what the other makes."""
    streams = Streams(None)
    first, second = batch_of((8, 4)), batch_of((5, 7))
    a, b = streams.of(first), streams.of(second)
    groups = [Group((0, 1), "ring", (0, 1), 12, 0.0, 0.0, 0.0, 0)]
    with mock.patch.object(contexts, "Preparer") as preparer:
        lists = Lists(Config(), Topology(2, 0), torch.device("cpu"))
        begin = preparer.return_value.begin
        lists.take([a])
        lists.begin(groups, [first], [a])
        assert not begin.called
        lists.begin(groups, [second], [b])
        (part,) = begin.call_args.args[0]
        assert part.masks == b.masks
        assert part.layout is b.layout
        assert part.strategy == "ring"
        lists.take([b])
        lists.begin(groups, [first], [a])
        assert begin.call_count == 2
