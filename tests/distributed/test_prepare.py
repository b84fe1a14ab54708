"""What is made ahead of a call is what the call asks for, nothing missing, nothing too much."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dist_attn.attention import attention, prepare
from dist_attn.attention.prepare import Heads, Part, Preparer, steps_of
from dist_attn.attention.tile_step import TileStep
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask
from tests.attention_cases import INNER_SIZE, Case, layout_of, mask_of, world_group
from tests.mask_zoo import NUM_HEADS, SEQ_LEN
from tests.ranks import run_ranks

CASE = Case((SEQ_LEN,), num_heads=NUM_HEADS, num_kv_heads=2)
KINDS = ("ring", "gather", "ulysses")
STRATEGIES = (*KINDS, *(f"{inner}+{outer}" for inner in KINDS for outer in KINDS))
HEADS = Heads(CASE.num_heads, CASE.num_kv_heads, CASE.head_dim, CASE.dtype)


def used_by_call(mask_: Mask, layout: Layout, group: CommGroup, strategy: str) -> list[TileStep]:
    """The steps that forward and backward really compute."""
    used: dict[int, TileStep] = {}
    work = TileStep._work

    def watched(self: TileStep, k: torch.Tensor) -> Iterator[object]:
        used[id(self)] = self
        return work(self, k)

    rows = torch.from_numpy(layout.positions(group.cp_rank))
    q, k, v, dout = (x[rows] for x in CASE.tensors().values())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with mock.patch.object(TileStep, "_work", watched):
        out = attention(*leaves, mask=mask_, layout=layout, group=group, strategy=strategy)
        out.backward(dout)
    return list(used.values())


def compare(mask_name: str) -> dict[str, tuple[int, int, int]]:
    """Steps that are made ahead, those that are used, and those that are both."""
    found = {}
    for strategy in STRATEGIES:
        inner_size = INNER_SIZE[4] if "+" in strategy else None
        group, layout, mask_ = (
            world_group(inner_size),
            layout_of("zigzag", CASE),
            mask_of(mask_name, CASE),
        )
        part = Part((mask_,), layout, dist.get_rank(), strategy, inner_size)
        steps = [step for step, _ in steps_of([part], HEADS, torch.device("cpu"))]
        assert all(isinstance(s, TileStep) for s in steps)
        ahead = {id(s) for s in steps if len(s._q_positions) and len(s._k_positions)}
        used = {id(s) for s in used_by_call(mask_, layout, group, strategy)}
        found[strategy] = (len(ahead), len(used), len(ahead & used))
    return found


@pytest.mark.parametrize("mask_name", ["s2 and a dense head"])
def test_the_call_finds_its_steps_made(mask_name: str) -> None:
    for by_strategy in run_ranks(compare, 4, mask_name):
        for strategy, (ahead, used, both) in by_strategy.items():
            assert ahead == used == both > 0, strategy


def test_a_failure_is_raised_where_it_is_waited_for() -> None:
    """And a CPU has nothing to make ahead."""
    preparer = Preparer(torch.device("cpu"), HEADS)
    preparer.begin([])
    preparer.take()
    fake = mock.MagicMock()
    with (
        mock.patch.object(torch, "cuda", fake),
        mock.patch.object(prepare, "why_not_block_sparse", return_value=None),
        mock.patch.object(prepare, "steps_of", side_effect=RuntimeError("no such mask")),
    ):
        preparer = Preparer(torch.device("cuda", 0), HEADS)
        preparer.begin([])
        with pytest.raises(RuntimeError, match="no such mask"):
            preparer.take()
        preparer.take()
    assert fake.Stream.called
