"""Query gradients for Hopper in Gluon: the shape of the forward, three products a step.

NARROW, as in the forward: items of 64 queries, a ring and a loading warp for each warpgroup.
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
    load_item,
    load_step,
    masked_scores,
    num_multiprocessors,
    panels,
    post_item,
    read_item,
    start_product,
    step_blocks,
)
from dist_attn_kernels.gluon_compat import reinterpret, tma_load, tma_store
from dist_attn_kernels.lists import BlockLists


@gluon.jit
def load_partition(
    loads, SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, NARROW: gl.constexpr,
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
    WIDTH: gl.constexpr = 64 if NARROW else 128
    WALKERS: gl.constexpr = 2 if NARROW else 1
    count = 0
    turn = 0
    index = gl.program_id(0) * WALKERS + SIDE
    head, _, row, first, steps, _, _ = load_item(
        rows_ptr, index, num_items, REPEAT, TOGETHER, WIDTH
    )
    block0, block1 = step_blocks(blocks_ptr, first, WIDTH)
    while index < num_items:
        index = post_item(counter_ptr, board, posted, turn, WALKERS, SIDE)
        head_, _, row_, first_, steps_, _, _ = load_item(
            rows_ptr, index, num_items, REPEAT, TOGETHER, WIDTH
        )
        kv_col = (head // GROUP) * D
        for i in range(steps):
            ahead = gl.where(i + 1 < steps, first + i + 1, first_)
            block0_, block1_ = step_blocks(blocks_ptr, ahead, WIDTH)
            stage = SIDE * STAGES + count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            load_step(k_desc, k_ring, stage, block0, block1, kv_col, k_full.index(stage), D, WIDTH)
            mbarrier.wait(v_empty.index(stage), phase)
            load_step(v_desc, v_ring, stage, block0, block1, kv_col, v_full.index(stage), D, WIDTH)
            count += 1
            block0 = block0_
            block1 = block1_
            if i == 0:
                for part in gl.static_range(WIDTH // 64):
                    side = SIDE + part
                    bar = q_full.index(side)
                    mbarrier.wait(q_empty.index(side), (turn & 1) ^ 1)
                    mbarrier.expect(bar, 2 * 64 * D * 2)
                    for p in gl.static_range(PANELS):
                        at = side * PANELS + p
                        col = head * D + p * 64
                        tma_load(q_desc, [row + part * 64, col], bar, q_ring.index(at))
                        tma_load(do_desc, [row + part * 64, col], bar, do_ring.index(at))
        turn += 1
        head = head_
        row = row_
        first = first_
        steps = steps_


@gluon.jit
def compute_partition(
    tables, sizes, views,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Dq of 64 queries of every item; the scores of step i + 1 run behind dq of step i."""
    dq_desc, lse_ptr, delta_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride = sizes
    q_view, do_view, k_view, v_view, dq_view, dq_ring, board, posted, bars = views
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PANELS: gl.constexpr = D // 64
    WIDTH: gl.constexpr = 64 if NARROW else 128
    # Whose items, rings and barriers: its own, or the first ones, which both sides share.
    OWN: gl.constexpr = SIDE if NARROW else 0
    PART: gl.constexpr = 0 if NARROW else SIDE
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    MMA_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA_OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    dtype: gl.constexpr = q_view.dtype
    q = q_view.index(SIDE)
    do = do_view.index(SIDE)
    count = 0
    turn = 0
    index = gl.program_id(0) * (2 if NARROW else 1) + OWN
    head, mask_head, row, first, steps, first_kind, masked = load_item(
        rows_ptr, index, num_items, REPEAT, TOGETHER, WIDTH
    )
    while index < num_items:
        index = read_item(board, posted, turn, OWN)
        head_, mask_head_, row_, first_, steps_, first_kind_, masked_ = load_item(
            rows_ptr, index, num_items, REPEAT, TOGETHER, WIDTH
        )
        rows = row + PART * 64 + gl.arange(0, 64, ROW)
        bounds_ptr = intervals_ptr + mask_head * interval_stride
        at = head.to(gl.int64) * q_pad + rows
        lse = gl.load(lse_ptr + at, mask=rows < q_pad, other=float("inf"))
        delta = gl.load(delta_ptr + at, mask=rows < q_pad, other=0.0)
        acc = gl.zeros([64, D], gl.float32, MMA_OUT)
        mbarrier.wait(q_full.index(SIDE), turn & 1)
        s = start_product(q, k_view, k_full, count, True, WIDTH, STAGES, OWN)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        for i in range(steps):
            stage = OWN * STAGES + count % STAGES
            dp = start_product(do, v_view, v_full, count, True, WIDTH, STAGES, OWN)
            if i < masked:
                s = masked_scores(
                    s, rows, blocks_ptr, kinds_ptr, first + i, first_kind + i,
                    q_len, k_len, bounds_ptr, bits_ptr, PART, PAIRS, HAS_BITS, MMA, WIDTH,
                )  # fmt: skip
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
            dp = hopper.warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v_empty.index(stage), count=1)
            # What q is multiplied with behind the last step is for nothing: it may be new.
            mbarrier.arrive(q_empty.index(SIDE), count=1, pred=i + 1 == steps)
            ds = (p * (dp - gl.expand_dims(delta, 1))).to(dtype)
            ds = gl.convert_layout(ds, OPERAND)
            acc = hopper.warpgroup_mma(ds, k_view.index(stage), acc, is_async=True)
            count += 1
            s = start_product(q, k_view, k_full, count, i + 1 < steps, WIDTH, STAGES, OWN)
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(k_empty.index(stage), count=1)
            s = hopper.warpgroup_mma_wait(0, deps=[s])
        tma.store_wait(0)
        dq_view.index(SIDE).store((acc * scale).to(dtype))
        hopper.fence_async_shared()
        for p_ in gl.static_range(PANELS):
            at = dq_ring.index(SIDE * PANELS + p_)
            tma_store(dq_desc, [row + PART * 64, head * D + p_ * 64], at)
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
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Split the program into loading warps and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    WIDTH: gl.constexpr = 64 if NARROW else 128
    RINGS: gl.constexpr = 2 if NARROW else 1
    READERS: gl.constexpr = 1 if NARROW else 2
    SLOTS: gl.constexpr = RINGS * STAGES
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    do_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    dq_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS * (WIDTH // 64) * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [SLOTS * (WIDTH // 64) * PANELS, 64, 64], PANEL)
    q_view = reinterpret(q_ring, dtype, [2, 64, D], PANEL)
    do_view = reinterpret(do_ring, dtype, [2, 64, D], PANEL)
    dq_view = reinterpret(dq_ring, dtype, [2, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [SLOTS, WIDTH, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [SLOTS, WIDTH, D], PANEL)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    board = gl.allocate_shared_memory(gl.int32, [4 * RINGS, 1], FLAT)
    posted = gl.allocate_shared_memory(gl.int64, [4 * RINGS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4 * RINGS):
        mbarrier.init(posted.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=READERS)
        mbarrier.init(v_empty.index(i), count=READERS)
    hopper.fence_async_shared()
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (dq_desc, lse_ptr, delta_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride)
    views = (q_view, do_view, k_view, v_view, dq_view, dq_ring, board, posted, bars)
    rings = (q_ring, do_ring, k_ring, v_ring, board, posted)
    loads = (
        q_desc, do_desc, k_desc, v_desc, rows_ptr, blocks_ptr, counter_ptr, num_items, rings, bars,
    )  # fmt: skip
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    if NARROW:
        gl.warp_specialize(
            [
                (compute_partition, (tables, sizes, views, UPPER, REPEAT, TOGETHER, D, STAGES,
                                     PAIRS, HAS_BITS, NARROW)),
                (compute_partition, (tables, sizes, views, LOWER, REPEAT, TOGETHER, D, STAGES,
                                     PAIRS, HAS_BITS, NARROW)),
                (load_partition, (loads, UPPER, REPEAT, TOGETHER, GROUP, D, STAGES, NARROW)),
                (load_partition, (loads, LOWER, REPEAT, TOGETHER, GROUP, D, STAGES, NARROW)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute_partition, (tables, sizes, views, UPPER, REPEAT, TOGETHER, D, STAGES,
                                     PAIRS, HAS_BITS, NARROW)),
                (compute_partition, (tables, sizes, views, LOWER, REPEAT, TOGETHER, D, STAGES,
                                     PAIRS, HAS_BITS, NARROW)),
                (load_partition, (loads, UPPER, REPEAT, TOGETHER, GROUP, D, STAGES, NARROW)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def dq_arguments(
    tensors: tuple[Tensor, ...], dq: Tensor, lists: BlockLists, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `dq_kernel` is launched with; lse in powers of two and delta are padded to blocks."""
    q, k, v, dout, lse, delta = tensors
    repeat, group = q.shape[1] // lists.num_mask_heads, q.shape[1] // k.shape[1]
    bits = lists.intervals if lists.bits is None else lists.bits
    rows, row_blocks, row_kinds = lists.walked_rows
    args = (
        panels(q), panels(dout), panels(k), panels(v), panels(dq), lse, delta,
        rows, row_blocks, row_kinds, lists.intervals, bits,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        rows.shape[0] * repeat, lists.q_len, lists.k_len, lse.shape[1], scale * LOG2_E, scale,
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
        "NARROW": lists.narrow is not None,
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
