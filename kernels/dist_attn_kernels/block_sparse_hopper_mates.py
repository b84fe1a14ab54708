"""Forward for masks whose neighbouring query blocks have little in common, for Hopper in Gluon.

Loads are what such masks are short of: a tile of 64 x 64 brings 32 KiB of keys and values from L2
for its two products. An item is two query blocks of one head, wherever they lie, chosen for the
key blocks that they share, one a warpgroup. A loading warp fetches every key block that either
lists, once, into one ring; a warpgroup passes over what its block does not list. No tile is
computed that is not listed.

A warpgroup waits for every stage, also for those that it passes over: a barrier's parity tells one
lap of the ring from the next only to who waits for every lap. A step's products are not carried
over into the next step, which may be one to pass over; the other warpgroup fills the gap.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0917 - a kernel takes its pointers by position.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dist_attn_kernels.block_sparse_hopper_parts import (
    LOG2_E,
    heads_together,
    load_pair,
    load_step,
    num_multiprocessors,
    panels,
    post_item,
    read_item,
    score_mask,
    softmax_step,
    start_product,
    store_rows,
)
from dist_attn_kernels.gluon_compat import reinterpret, tma_load
from dist_attn_kernels.lists import BlockLists, NarrowLists


@gluon.jit
def load_partition(
    loads, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the queries of every item and the keys and values of its steps."""
    q_desc, k_desc, v_desc, rows_ptr, steps_ptr, counter_ptr, num_items, rings, bars = loads
    q_ring, k_ring, v_ring, board, posted = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PANELS: gl.constexpr = D // 64
    count = 0
    turn = 0
    index = gl.program_id(0)
    head, block0, block1, first, steps, _, _ = load_pair(
        rows_ptr, index, num_items, REPEAT, TOGETHER
    )
    key = (gl.load(steps_ptr + first) >> 2) * 64
    while index < num_items:
        index = post_item(counter_ptr, board, posted, turn, 1, 0)
        head_, block0_, block1_, first_, steps_, _, _ = load_pair(
            rows_ptr, index, num_items, REPEAT, TOGETHER
        )
        kv_col = (head // GROUP) * D
        half = turn & 1
        mbarrier.wait(q_empty.index(half), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(half), 128 * D * 2)
        for p in gl.static_range(PANELS):
            col = head * D + p * 64
            at = half * 2 * PANELS + p
            tma_load(q_desc, [block0 * 64, col], q_full.index(half), q_ring.index(at))
            tma_load(q_desc, [block1 * 64, col], q_full.index(half), q_ring.index(at + PANELS))
        turn += 1
        for i in range(steps):
            # The next step's block, or the next item's first.
            ahead = gl.where(i + 1 < steps, first + i + 1, first_)
            key_ = (gl.load(steps_ptr + ahead) >> 2) * 64
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            load_step(k_desc, k_ring, stage, key, key, kv_col, k_full.index(stage), D, 64)
            mbarrier.wait(v_empty.index(stage), phase)
            load_step(v_desc, v_ring, stage, key, key, kv_col, v_full.index(stage), D, 64)
            count += 1
            key = key_
        head = head_
        block0 = block0_
        block1 = block1_
        first = first_
        steps = steps_


@gluon.jit
def compute_partition(
    tables, sizes, views,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """The softmax and both matrix products of one query block of every item."""
    out_desc, lse_ptr, rows_ptr, steps_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, q_len, k_len, scale_log2, interval_stride = sizes
    q_ring, q_view, k_view, v_view, board, posted, bars = views
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA_OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, MMA_OUT)
    COL: gl.constexpr = gl.SliceLayout(0, MMA)
    count = 0
    turn = 0
    index = gl.program_id(0)
    head, block0, block1, first, steps, first_kind, masked = load_pair(
        rows_ptr, index, num_items, REPEAT, TOGETHER
    )
    while index < num_items:
        index = read_item(board, posted, turn, 0)
        head_, block0_, block1_, first_, steps_, first_kind_, masked_ = load_pair(
            rows_ptr, index, num_items, REPEAT, TOGETHER
        )
        half = turn & 1
        q = q_view.index(half * 2 + SIDE)
        row = (block1 if SIDE else block0) * 64
        rows = row + gl.arange(0, 64, ROW)
        bounds_ptr = intervals_ptr + (head // REPEAT) * interval_stride
        top = gl.full([64], float("-inf"), gl.float32, ROW)
        total = gl.zeros([64], gl.float32, ROW)
        acc = gl.zeros([64, D], gl.float32, MMA_OUT)
        step = gl.load(steps_ptr + first)
        mbarrier.wait(q_full.index(half), (turn >> 1) & 1)
        for i in range(steps):
            # One behind the last step is in bounds: the table has an entry to spare.
            step_ = gl.load(steps_ptr + first + i + 1)
            stage = count % STAGES
            phase = (count // STAGES) & 1
            if ((step >> SIDE) & 1) == 1:
                s = start_product(q, k_view, k_full, count, True, 64, STAGES, 0)
                s = hopper.warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(stage), count=1)
                if i < masked:
                    kind = gl.load(kinds_ptr + (first_kind + i) * 2 + SIDE)
                    cols = gl.expand_dims(gl.arange(0, 64, COL), 0)
                    keep = score_mask(
                        kind, kind, gl.expand_dims(rows, 1), (step >> 2) * 64 + cols, cols,
                        q_len, k_len, bounds_ptr, bits_ptr, PAIRS, HAS_BITS,
                    )  # fmt: skip
                    s = gl.where(keep, s, float("-inf"))
                p, alpha, top = softmax_step(s, top, scale_log2)
                total = total * alpha + gl.sum(p, 1)
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, ROW_OUT), 1)
                probs = gl.convert_layout(p.to(v_view.dtype), PROBS)
                mbarrier.wait(v_full.index(stage), phase)
                acc = hopper.warpgroup_mma(probs, v_view.index(stage), acc, is_async=True)
                acc = hopper.warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(v_empty.index(stage), count=1)
            else:
                mbarrier.wait(k_full.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage), count=1)
            # The last item's output left from its queries' place, which is free once TMA has read
            # it.
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(half ^ 1), count=1, pred=(turn > 0) & (i == 0))
            count += 1
            step = step_
        store_rows(
            out_desc, lse_ptr + head.to(gl.int64) * q_len, acc, total, top, q, q_ring,
            half * 2 + SIDE, row, rows, q_len, head * D, D, ROW_OUT,
        )  # fmt: skip
        turn += 1
        head = head_
        block0 = block0_
        block1 = block1_
        first = first_
        steps = steps_
        first_kind = first_kind_
        masked = masked_
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "q_len", "k_len"])
def mates_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    rows_ptr, steps_ptr, kinds_ptr, intervals_ptr, bits_ptr, counter_ptr,
    num_items, q_len, k_len, scale_log2, interval_stride,
    REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """Split the program into the loading warp and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [4 * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 64, 64], PANEL)
    q_view = reinterpret(q_ring, dtype, [4, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [STAGES, 64, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [STAGES, 64, D], PANEL)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    board = gl.allocate_shared_memory(gl.int32, [4, 1], FLAT)
    posted = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(posted.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    hopper.fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (out_desc, lse_ptr, rows_ptr, steps_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (num_items, q_len, k_len, scale_log2, interval_stride)
    views = (q_ring, q_view, k_view, v_view, board, posted, bars)
    rings = (q_ring, k_ring, v_ring, board, posted)
    loads = (q_desc, k_desc, v_desc, rows_ptr, steps_ptr, counter_ptr, num_items, rings, bars)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (compute_partition, (tables, sizes, views, FIRST, REPEAT, TOGETHER, D, STAGES,
                                 PAIRS, HAS_BITS)),
            (compute_partition, (tables, sizes, views, SECOND, REPEAT, TOGETHER, D, STAGES,
                                 PAIRS, HAS_BITS)),
            (load_partition, (loads, REPEAT, TOGETHER, GROUP, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def mates_arguments(
    qkv: tuple[Tensor, ...], results: tuple[Tensor, Tensor], lists: BlockLists, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `mates_kernel` is launched with, by place and by name."""
    q, k, v = qkv
    out, lse = results
    repeat, group = q.shape[1] // lists.num_mask_heads, q.shape[1] // k.shape[1]
    assert isinstance(lists.narrow, NarrowLists)
    table, steps, kinds = lists.narrow.mates, lists.narrow.mate_steps, lists.narrow.mate_kinds
    args = (
        panels(q), panels(k), panels(v), panels(out), lse,
        table, steps, kinds, lists.intervals,
        lists.intervals if lists.bits is None else lists.bits,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        table.shape[0] * repeat, lists.q_len, lists.k_len, scale * LOG2_E,
        lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0,
    )  # fmt: skip
    names = {
        "REPEAT": repeat,
        "TOGETHER": heads_together(repeat, group) if lists.num_mask_heads == 1 else repeat,
        "GROUP": group,
        "D": q.shape[2],
        "STAGES": 5 if q.shape[2] == 128 else 8,
        "PAIRS": lists.num_intervals,
        "HAS_BITS": lists.bits is not None,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, names


def forward(
    qkv: tuple[Tensor, ...], results: tuple[Tensor, Tensor], lists: BlockLists, scale: float
) -> None:
    """Write out and lse of the listed rows."""
    args, names = mates_arguments(qkv, results, lists, scale)
    programs = min(num_multiprocessors(qkv[0].device.index or 0), args[11])
    mates_kernel[(programs,)](*args, **names)
