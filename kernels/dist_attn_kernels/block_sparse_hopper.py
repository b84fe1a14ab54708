"""Block-sparse forward for Hopper in Gluon: one warp loads, two warpgroups compute.

A program stays on its multiprocessor and takes one item (128 queries of one head) after another.
The loading warp fetches key and value blocks of 64, two listed blocks to a step of 128 keys, by TMA
into a ring of stages, and runs ahead into the next item. Each warpgroup owns 64 of the queries;
its scores of step i are computed by the tensor cores while they still add the values of step i - 1.
The warpgroups issue their products by turns: one's softmax then runs beside the other's products.

NARROW is for lists in which neighbouring query blocks have little in common: each warpgroup takes
items of its own, 64 queries of one head, and walks their key blocks one by one from a ring of its
own, which a loading warp of its own fills.
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

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def load_partition(
    loads, SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Fetch the queries of every item and the keys and values of its steps."""
    q_desc, k_desc, v_desc, rows_ptr, blocks_ptr, counter_ptr, num_items, rings, bars = loads
    q_ring, k_ring, v_ring, board, posted = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    PANELS: gl.constexpr = D // 64
    WIDTH: gl.constexpr = 64 if NARROW else 128
    WALKERS: gl.constexpr = 2 if NARROW else 1
    V_STAGES: gl.constexpr = STAGES + 1 if NARROW else STAGES
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
        half = turn & 1
        bar = SIDE * 2 + half
        mbarrier.wait(q_empty.index(bar), ((turn >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(bar), WIDTH * D * 2)
        for part in gl.static_range(WIDTH // 64):
            for p in gl.static_range(PANELS):
                panel = q_ring.index((half * 2 + SIDE + part) * PANELS + p)
                tma_load(q_desc, [row + part * 64, head * D + p * 64], q_full.index(bar), panel)
        turn += 1
        for i in range(steps):
            # The next step's blocks, or the next item's first: their latency hides behind the wait.
            ahead = gl.where(i + 1 < steps, first + i + 1, first_)
            block0_, block1_ = step_blocks(blocks_ptr, ahead, WIDTH)
            stage = SIDE * STAGES + count % STAGES
            mbarrier.wait(k_empty.index(stage), ((count // STAGES) & 1) ^ 1)
            load_step(k_desc, k_ring, stage, block0, block1, kv_col, k_full.index(stage), D, WIDTH)
            stage = SIDE * V_STAGES + count % V_STAGES
            mbarrier.wait(v_empty.index(stage), ((count // V_STAGES) & 1) ^ 1)
            load_step(v_desc, v_ring, stage, block0, block1, kv_col, v_full.index(stage), D, WIDTH)
            count += 1
            block0 = block0_
            block1 = block1_
        head = head_
        row = row_
        first = first_
        steps = steps_


@gluon.jit
def softmax_step(s, top, scale_log2):
    """Probabilities against the new running maximum, and the factor for what came before."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(safe, 1))
    alpha = gl.exp2(top - safe)
    return p, alpha, new_top


@gluon.jit
def compute_partition(
    tables, sizes, views,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """The softmax and both matrix products of 64 queries of every item."""
    out_desc, lse_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, q_len, k_len, scale_log2, interval_stride = sizes
    q_ring, q_view, k_view, v_view, board, posted, bars = views
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    WIDTH: gl.constexpr = 64 if NARROW else 128
    V_STAGES: gl.constexpr = STAGES + 1 if NARROW else STAGES
    # Whose items, rings and barriers: its own, or the first ones, which both sides share.
    OWN: gl.constexpr = SIDE if NARROW else 0
    PART: gl.constexpr = 0 if NARROW else SIDE
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    MMA_OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, MMA_OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    ROW_OUT: gl.constexpr = gl.SliceLayout(1, MMA_OUT)
    PANELS: gl.constexpr = D // 64
    if not NARROW:
        mbarrier.arrive(turns.index(0), count=1, pred=SIDE == 1)
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
        half = turn & 1
        q = q_view.index(half * 2 + SIDE)
        rows = row + PART * 64 + gl.arange(0, 64, ROW)
        bounds_ptr = intervals_ptr + mask_head * interval_stride
        top = gl.full([64], float("-inf"), gl.float32, ROW)
        acc = gl.zeros([64, D], gl.float32, MMA_OUT)
        mbarrier.wait(q_full.index(OWN * 2 + half), (turn >> 1) & 1)
        stage = OWN * STAGES + count % STAGES
        if not NARROW:
            mbarrier.wait(turns.index(SIDE), count & 1)
        s = start_product(q, k_view, k_full, count, True, WIDTH, STAGES, OWN)
        if not NARROW:
            mbarrier.arrive(turns.index(1 - SIDE), count=1)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if masked > 0:
            s = masked_scores(
                s, rows, blocks_ptr, kinds_ptr, first, first_kind,
                q_len, k_len, bounds_ptr, bits_ptr, PART, PAIRS, HAS_BITS, MMA, WIDTH,
            )  # fmt: skip
        p, alpha, top = softmax_step(s, top, scale_log2)
        total = gl.sum(p, 1)
        # The last item's output left from its queries' place, which is free once TMA has read it.
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(OWN * 2 + (half ^ 1)), count=1, pred=turn > 0)
        probs = gl.convert_layout(p.to(v_view.dtype), PROBS)
        for i in range(1, steps):
            last = OWN * V_STAGES + count % V_STAGES
            last_phase = (count // V_STAGES) & 1
            count += 1
            stage = OWN * STAGES + count % STAGES
            if not NARROW:
                mbarrier.wait(turns.index(SIDE), count & 1)
            s = start_product(q, k_view, k_full, count, True, WIDTH, STAGES, OWN)
            mbarrier.wait(v_full.index(last), last_phase)
            acc = hopper.warpgroup_mma(probs, v_view.index(last), acc, is_async=True)
            if not NARROW:
                mbarrier.arrive(turns.index(1 - SIDE), count=1)
            s = hopper.warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if i < masked:
                s = masked_scores(
                    s, rows, blocks_ptr, kinds_ptr, first + i, first_kind + i,
                    q_len, k_len, bounds_ptr, bits_ptr, PART, PAIRS, HAS_BITS, MMA, WIDTH,
                )  # fmt: skip
            p, alpha, top = softmax_step(s, top, scale_log2)
            total = total * alpha + gl.sum(p, 1)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(last), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, ROW_OUT), 1)
            probs = gl.convert_layout(p.to(v_view.dtype), PROBS)
        last = OWN * V_STAGES + count % V_STAGES
        mbarrier.wait(v_full.index(last), (count // V_STAGES) & 1)
        acc = hopper.warpgroup_mma(probs, v_view.index(last), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(last), count=1)
        count += 1
        none = total == 0.0
        lse = gl.where(none, float("-inf"), (top + gl.log2(total)) * LN_2)
        gl.store(lse_ptr + head.to(gl.int64) * q_len + rows, lse, mask=rows < q_len)
        factor = gl.convert_layout(1.0 / gl.where(none, 1.0, total), ROW_OUT)
        q.store((acc * gl.expand_dims(factor, 1)).to(q_view.dtype))
        hopper.fence_async_shared()
        for panel in gl.static_range(PANELS):
            at = q_ring.index((half * 2 + SIDE) * PANELS + panel)
            tma_store(out_desc, [row + PART * 64, head * D + panel * 64], at)
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
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr, counter_ptr,
    num_items, q_len, k_len, scale_log2, interval_stride,
    REPEAT: gl.constexpr, TOGETHER: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Split the program into loading warps and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    WIDTH: gl.constexpr = 64 if NARROW else 128
    # Rings and readers of a ring; walkers of items that are their own.
    RINGS: gl.constexpr = 2 if NARROW else 1
    READERS: gl.constexpr = 1 if NARROW else 2
    SLOTS: gl.constexpr = RINGS * STAGES
    # Values are held longer than keys.
    V_SLOTS: gl.constexpr = RINGS * (STAGES + 1 if NARROW else STAGES)
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [4 * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [SLOTS * (WIDTH // 64) * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [V_SLOTS * (WIDTH // 64) * PANELS, 64, 64], PANEL)
    q_view = reinterpret(q_ring, dtype, [4, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [SLOTS, WIDTH, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [V_SLOTS, WIDTH, D], PANEL)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * RINGS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * RINGS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V_SLOTS, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [V_SLOTS, 1], mbarrier.MBarrierLayout())
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    board = gl.allocate_shared_memory(gl.int32, [4 * RINGS, 1], FLAT)
    posted = gl.allocate_shared_memory(gl.int64, [4 * RINGS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4 * RINGS):
        mbarrier.init(posted.index(i), count=1)
    for i in gl.static_range(2 * RINGS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=READERS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=READERS)
    for i in gl.static_range(V_SLOTS):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=READERS)
    hopper.fence_async_shared()
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    all_bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    tables = (out_desc, lse_ptr, rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (num_items, q_len, k_len, scale_log2, interval_stride)
    views = (q_ring, q_view, k_view, v_view, board, posted, all_bars)
    rings = (q_ring, k_ring, v_ring, board, posted)
    loads = (q_desc, k_desc, v_desc, rows_ptr, blocks_ptr, counter_ptr, num_items, rings, bars)
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


def forward_arguments(
    qkv: tuple[Tensor, ...], results: tuple[Tensor, Tensor], lists: BlockLists, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `forward_kernel` is launched with, by place and by name."""
    q, k, v = qkv
    out, lse = results
    repeat, group = q.shape[1] // lists.num_mask_heads, q.shape[1] // k.shape[1]
    bits = lists.intervals if lists.bits is None else lists.bits
    interval_stride = lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0
    rows, row_blocks, row_kinds = lists.walked_rows
    args = (
        panels(q), panels(k), panels(v), panels(out), lse,
        rows, row_blocks, row_kinds, lists.intervals, bits,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        rows.shape[0] * repeat, lists.q_len, lists.k_len, scale * LOG2_E, interval_stride,
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


def forward(
    qkv: tuple[Tensor, ...], results: tuple[Tensor, Tensor], lists: BlockLists, scale: float
) -> None:
    """Write out and lse of the listed rows."""
    args, names = forward_arguments(qkv, results, lists, scale)
    programs = min(num_multiprocessors(qkv[0].device.index or 0), args[11])
    forward_kernel[(programs,)](*args, **names)
