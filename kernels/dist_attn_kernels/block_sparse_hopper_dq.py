"""Query gradients for Hopper in Gluon: the shape of the forward, three products a step."""

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
    load_item,
    load_pair,
    masked_scores,
    num_multiprocessors,
    panels,
    post_item,
    read_item,
    start_product,
)
from dist_attn_kernels.gluon_compat import reinterpret, tma_load, tma_store
from dist_attn_kernels.lists import BlockLists


@gluon.jit
def load_partition(
    loads, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch q and dout of every item and the keys and values of its steps.

    The first step's keys and values go out ahead of the item's queries, whose place is in use.
    """
    q_desc, do_desc, k_desc, v_desc, rows_ptr, blocks_ptr, counter_ptr, num_items, rings, bars = (
        loads
    )
    q_ring, do_ring, k_ring, v_ring, board, posted = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PANELS: gl.constexpr = D // 64
    count = 0
    turn = 0
    index = gl.program_id(0)
    head, _, row, first, steps, _, _ = load_item(rows_ptr, index, num_items, REPEAT, TOGETHER)
    block0 = gl.load(blocks_ptr + first * 2)
    block1 = gl.load(blocks_ptr + first * 2 + 1)
    while index < num_items:
        index = post_item(counter_ptr, board, posted, turn)
        head_, _, row_, first_, steps_, _, _ = load_item(
            rows_ptr, index, num_items, REPEAT, TOGETHER
        )
        kv_col = (head // GROUP) * D
        for i in range(steps):
            ahead = gl.where(i + 1 < steps, first + i + 1, first_)
            block0_ = gl.load(blocks_ptr + ahead * 2)
            block1_ = gl.load(blocks_ptr + ahead * 2 + 1)
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            base = stage * (2 * PANELS)
            mbarrier.wait(k_empty.index(stage), phase)
            load_pair(
                k_desc, k_ring, base, block0 * 64, block1 * 64, kv_col, k_full.index(stage), D
            )
            mbarrier.wait(v_empty.index(stage), phase)
            load_pair(
                v_desc, v_ring, base, block0 * 64, block1 * 64, kv_col, v_full.index(stage), D
            )
            count += 1
            block0 = block0_
            block1 = block1_
            if i == 0:
                mbarrier.wait(q_empty, (turn & 1) ^ 1)
                mbarrier.expect(q_full, 2 * 128 * D * 2)
                for side in gl.static_range(2):
                    for p in gl.static_range(PANELS):
                        at = side * PANELS + p
                        col = head * D + p * 64
                        tma_load(q_desc, [row + side * 64, col], q_full, q_ring.index(at))
                        tma_load(do_desc, [row + side * 64, col], q_full, do_ring.index(at))
        turn += 1
        head = head_
        row = row_
        first = first_
        steps = steps_


@gluon.jit
def compute_partition(
    tables, sizes, views,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """Dq of 64 queries of every item; the scores of step i + 1 run behind dq of step i."""
    dq_desc, lse_ptr, delta_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride = sizes
    q_view, do_view, k_view, v_view, dq_view, dq_ring, board, posted, bars = views
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PANELS: gl.constexpr = D // 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    MMA_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA_OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    dtype: gl.constexpr = q_view.dtype
    q = q_view.index(SIDE)
    do = do_view.index(SIDE)
    count = 0
    turn = 0
    index = gl.program_id(0)
    head, mask_head, row, first, steps, first_kind, masked = load_item(
        rows_ptr, index, num_items, REPEAT, TOGETHER
    )
    while index < num_items:
        index = read_item(board, posted, turn)
        head_, mask_head_, row_, first_, steps_, first_kind_, masked_ = load_item(
            rows_ptr, index, num_items, REPEAT, TOGETHER
        )
        rows = row + SIDE * 64 + gl.arange(0, 64, ROW)
        bounds_ptr = intervals_ptr + mask_head * interval_stride
        at = head.to(gl.int64) * q_pad + rows
        lse = gl.load(lse_ptr + at, mask=rows < q_pad, other=float("inf"))
        delta = gl.load(delta_ptr + at, mask=rows < q_pad, other=0.0)
        acc = gl.zeros([64, D], gl.float32, MMA_OUT)
        mbarrier.wait(q_full, turn & 1)
        s = start_product(q, k_view, k_full, count, True, 128, STAGES)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        for i in range(steps):
            stage = count % STAGES
            dp = start_product(do, v_view, v_full, count, True, 128, STAGES)
            if i < masked:
                s = masked_scores(
                    s, rows, blocks_ptr, kinds_ptr, first + i, first_kind + i,
                    q_len, k_len, bounds_ptr, bits_ptr, SIDE, PAIRS, HAS_BITS, MMA,
                )  # fmt: skip
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
            dp = hopper.warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v_empty.index(stage), count=1)
            ds = (p * (dp - gl.expand_dims(delta, 1))).to(dtype)
            ds = gl.convert_layout(ds, OPERAND)
            acc = hopper.warpgroup_mma(ds, k_view.index(stage), acc, is_async=True)
            count += 1
            s = start_product(q, k_view, k_full, count, i + 1 < steps, 128, STAGES)
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = hopper.warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(q_empty, count=1)
        tma.store_wait(0)
        dq_view.index(SIDE).store((acc * scale).to(dtype))
        hopper.fence_async_shared()
        for p_ in gl.static_range(PANELS):
            at = dq_ring.index(SIDE * PANELS + p_)
            tma_store(dq_desc, [row + SIDE * 64, head * D + p_ * 64], at)
        turn += 1
        head = head_
        mask_head = mask_head_
        row = row_
        first = first_
        steps = steps_
        first_kind = first_kind_
        masked = masked_
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "q_len", "k_len"])
def dq_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, lse_ptr, delta_ptr,
    rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr, counter_ptr,
    num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride,
    REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """Split the program into the loading warp and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    do_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    dq_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES * 2 * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES * 2 * PANELS, 64, 64], PANEL)
    q_view = reinterpret(q_ring, dtype, [2, 64, D], PANEL)
    do_view = reinterpret(do_ring, dtype, [2, 64, D], PANEL)
    dq_view = reinterpret(dq_ring, dtype, [2, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [STAGES, 128, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [STAGES, 128, D], PANEL)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    board = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    posted = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(posted.index(i), count=1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    hopper.fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (dq_desc, lse_ptr, delta_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride)
    views = (q_view, do_view, k_view, v_view, dq_view, dq_ring, board, posted, bars)
    rings = (q_ring, do_ring, k_ring, v_ring, board, posted)
    loads = (
        q_desc,
        do_desc,
        k_desc,
        v_desc,
        rows_ptr,
        blocks_ptr,
        counter_ptr,
        num_items,
        rings,
        bars,
    )
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                compute_partition,
                (tables, sizes, views, UPPER, REPEAT, TOGETHER, D, STAGES, PAIRS, HAS_BITS),
            ),
            (
                compute_partition,
                (tables, sizes, views, LOWER, REPEAT, TOGETHER, D, STAGES, PAIRS, HAS_BITS),
            ),
            (load_partition, (loads, REPEAT, TOGETHER, GROUP, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def dq_arguments(
    tensors: tuple[Tensor, ...], dq: Tensor, lists: BlockLists, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `dq_kernel` is launched with; lse in powers of two and delta are padded to blocks."""
    q, k, v, dout, lse, delta = tensors
    repeat, group = q.shape[1] // lists.num_mask_heads, q.shape[1] // k.shape[1]
    bits = lists.intervals if lists.bits is None else lists.bits
    args = (
        panels(q), panels(dout), panels(k), panels(v), panels(dq), lse, delta,
        lists.rows, lists.row_blocks, lists.row_kinds, lists.intervals, bits,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        lists.rows.shape[0] * repeat, lists.q_len, lists.k_len, lse.shape[1], scale * LOG2_E, scale,
        lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0,
    )  # fmt: skip
    names = {
        "REPEAT": repeat,
        "TOGETHER": heads_together(repeat, group) if lists.num_mask_heads == 1 else repeat,
        "GROUP": group,
        "D": q.shape[2],
        "STAGES": 2 if q.shape[2] == 128 else 4,
        "PAIRS": lists.num_intervals,
        "HAS_BITS": lists.bits is not None,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, names


def query_gradient(
    tensors: tuple[Tensor, ...], dq: Tensor, lists: BlockLists, scale: float
) -> None:
    """Write dq of the listed rows from (q, k, v, dout, lse, delta)."""
    args, names = dq_arguments(tensors, dq, lists, scale)
    programs = min(num_multiprocessors(dq.device.index or 0), args[13])
    dq_kernel[(programs,)](*args, **names)
