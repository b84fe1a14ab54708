"""Key and value gradients of block-sparse attention for Hopper in Gluon.

A program owns two key blocks of 64, one a warpgroup and not necessarily neighbours, and walks the
query blocks that read them. Scores are computed transposed, keys by queries, so that probabilities
and their gradients are operands of dv and dk right in the registers in which they arise: the
warpgroups exchange nothing. The scores of a step run behind dk and dv of the step before.

NARROW: each warpgroup takes items of its own, one key block, with a ring and a loading warp of its
own; shared memory then holds keys and values once, and results leave from a place of their own.
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
    num_multiprocessors,
    panels,
    place_item,
    post_item,
    read_item,
    score_mask,
    start_product,
)
from dist_attn_kernels.gluon_compat import reinterpret, tma_load, tma_store
from dist_attn_kernels.lists import BlockLists


@gluon.jit
def load_column(cols_ptr, index, num_items, REPEAT: gl.constexpr, TOGETHER: gl.constexpr):
    """Head, both key blocks, first entry, entries, first kind, masked entries of an item."""
    place, head_in_mask = place_item(index, num_items, REPEAT, TOGETHER)
    item = cols_ptr + place * 7
    head = gl.load(item) * REPEAT + head_in_mask
    block0 = gl.load(item + 1)
    block1 = gl.load(item + 2)
    return (
        head,
        block0,
        block1,
        gl.load(item + 3),
        gl.load(item + 4),
        gl.load(item + 5),
        gl.load(item + 6),
    )


@gluon.jit
def load_partition(
    loads, sizes, rings, bars,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, LOOP: gl.constexpr,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
    NARROW: gl.constexpr,
):  # fmt: skip
    """Fetch the keys and values of every item and the queries of its steps.

    The first queries go out ahead of the keys and values, whose place may still be in use.
    """
    q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, cols_ptr, entries_ptr, counter_ptr = loads
    num_items, q_pad = sizes
    q_ring, do_ring, k_ring, v_ring, stats, board, posted = rings
    kv_full, kv_empty, q_full, do_full, empty = bars
    PANELS: gl.constexpr = D // 64
    FLAT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    offsets = gl.arange(0, 64, FLAT)
    WALKERS: gl.constexpr = 2 if NARROW else 1
    count = 0
    turn = 0
    index = gl.program_id(0) * WALKERS + SIDE
    kv_head, block0, block1, first, steps, _, _ = load_column(
        cols_ptr, index, num_items, REPEAT, TOGETHER
    )
    entry = gl.load(entries_ptr + first)
    while index < num_items:
        index = post_item(counter_ptr, board, posted, turn, WALKERS, SIDE)
        kv_head_, block0_, block1_, first_, steps_, _, _ = load_column(
            cols_ptr, index, num_items, REPEAT, TOGETHER
        )
        kv_at = turn % PLACES
        kv_phase = ((turn // PLACES) & 1) ^ 1
        for i in range(steps * LOOP):
            head = kv_head * GROUP + i % LOOP + (entry >> 24)
            row = (entry & 0xFFFFFF) * 64
            stat = head.to(gl.int64) * q_pad + row + offsets
            lse = gl.load(lse_ptr + stat)
            delta = gl.load(delta_ptr + stat)
            # The next step's entry, or the next item's first.
            entry = gl.load(
                entries_ptr + gl.where(i + 1 < steps * LOOP, first + (i + 1) // LOOP, first_)
            )
            stage = SIDE * STAGES + count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), 64 * D * 2)
            for p in gl.static_range(PANELS):
                panel = q_ring.index(stage * PANELS + p)
                tma_load(q_desc, [row, head * D + p * 64], q_full.index(stage), panel)
            mbarrier.expect(do_full.index(stage), 64 * D * 2)
            for p in gl.static_range(PANELS):
                panel = do_ring.index(stage * PANELS + p)
                tma_load(do_desc, [row, head * D + p * 64], do_full.index(stage), panel)
            stats.index(stage * 2).store(lse)
            stats.index(stage * 2 + 1).store(delta)
            mbarrier.arrive(q_full.index(stage), count=1)
            count += 1
            if i == 0:
                bar = kv_full.index(SIDE * PLACES + kv_at)
                mbarrier.wait(kv_empty.index(SIDE * PLACES + kv_at), kv_phase)
                mbarrier.expect(bar, 2 * (64 if NARROW else 128) * D * 2)
                for p in gl.static_range(PANELS):
                    col = kv_head * D + p * 64
                    at = (kv_at * 2 + SIDE) * PANELS + p
                    tma_load(k_desc, [block0 * 64, col], bar, k_ring.index(at))
                    tma_load(v_desc, [block0 * 64, col], bar, v_ring.index(at))
                    if not NARROW:
                        tma_load(k_desc, [block1 * 64, col], bar, k_ring.index(at + PANELS))
                        tma_load(v_desc, [block1 * 64, col], bar, v_ring.index(at + PANELS))
        turn += 1
        kv_head = kv_head_
        block0 = block0_
        block1 = block1_
        first = first_
        steps = steps_


@gluon.jit
def store_block(desc, values, view, ring, SIDE: gl.constexpr, block, kv_head, D: gl.constexpr):
    """Send a side's result from its place for results, once what lay there has left."""
    tma.store_wait(0)
    view.index(SIDE).store(values)
    hopper.fence_async_shared()
    for panel in gl.static_range(D // 64):
        at = ring.index(SIDE * (D // 64) + panel)
        tma_store(desc, [block * 64, kv_head * D + panel * 64], at)


@gluon.jit
def compute_partition(
    tables, sizes, smem, bars,
    SIDE: gl.constexpr, REPEAT: gl.constexpr, TOGETHER: gl.constexpr, LOOP: gl.constexpr,
    GROUP: gl.constexpr, HEADS_PER_MASK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    PLACES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Dk and dv of one key block of every item."""
    dk_desc, dv_desc, cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, q_len, k_len, scale_log2, scale, interval_stride = sizes
    q_view, do_view, k_view, v_view, k_ring, v_ring, out_view, out_ring = smem[:8]
    stats, board, posted = smem[8:]
    kv_full, kv_empty, q_full, do_full, empty = bars
    PANELS: gl.constexpr = D // 64
    OWN: gl.constexpr = SIDE if NARROW else 0
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA_D, 2)
    COL: gl.constexpr = gl.SliceLayout(0, MMA_S)
    dtype: gl.constexpr = q_view.dtype
    key_in = gl.arange(0, 64, gl.SliceLayout(1, MMA_S))
    count = 0
    turn = 0
    index = gl.program_id(0) * (2 if NARROW else 1) + OWN
    kv_head, block0, block1, first, steps, first_kind, masked = load_column(
        cols_ptr, index, num_items, REPEAT, TOGETHER
    )
    while index < num_items:
        kv_at = turn % PLACES
        index = read_item(board, posted, turn, OWN)
        kv_head_, block0_, block1_, first_, steps_, first_kind_, masked_ = load_column(
            cols_ptr, index, num_items, REPEAT, TOGETHER
        )
        k = k_view.index(kv_at * 2 + SIDE)
        v = v_view.index(kv_at * 2 + SIDE)
        block = block1 if SIDE else block0
        dk = gl.zeros([64, D], gl.float32, MMA_D)
        dv = gl.zeros([64, D], gl.float32, MMA_D)
        mbarrier.wait(kv_full.index(OWN * PLACES + kv_at), (turn // PLACES) & 1)
        s = start_product(k, q_view, q_full, count, True, 64, STAGES, OWN)
        s = hopper.warpgroup_mma_wait(0, deps=[s])
        if PLACES == 2:
            # The item before left from the other place, which is free once TMA has read it.
            tma.store_wait(0)
            mbarrier.arrive(kv_empty.index(OWN * 2 + (kv_at ^ 1)), count=1, pred=turn > 0)
        for i in range(steps * LOOP):
            stage = OWN * STAGES + count % STAGES
            dp = start_product(v, do_view, do_full, count, True, 64, STAGES, OWN)
            lse = stats.index(stage * 2).load(COL)
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
            if i < masked * LOOP:
                entry = gl.load(entries_ptr + first + i // LOOP)
                head = kv_head * GROUP + i % LOOP + (entry >> 24)
                rows = gl.expand_dims((entry & 0xFFFFFF) * 64 + gl.arange(0, 64, COL), 0)
                kind = gl.load(kinds_ptr + (first_kind + i // LOOP) * 2 + SIDE)
                bounds_ptr = intervals_ptr + (head // HEADS_PER_MASK) * interval_stride
                keep = score_mask(
                    kind, kind, rows, gl.expand_dims(block * 64 + key_in, 1),
                    gl.expand_dims(key_in, 1), q_len, k_len, bounds_ptr, bits_ptr, PAIRS, HAS_BITS,
                )  # fmt: skip
                p = gl.where(keep, p, 0.0)
            probs = gl.convert_layout(p.to(dtype), OPERAND)
            dv = hopper.warpgroup_mma(probs, do_view.index(stage), dv, is_async=True)
            dp = hopper.warpgroup_mma_wait(1, deps=[dp])
            if PLACES == 1:
                # What k is multiplied with behind the last step is for nothing: it may be new.
                mbarrier.arrive(kv_empty.index(OWN), count=1, pred=i + 1 == steps * LOOP)
            delta = stats.index(stage * 2 + 1).load(COL)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
            ds = gl.convert_layout(ds, OPERAND)
            dk = hopper.warpgroup_mma(ds, q_view.index(stage), dk, is_async=True)
            count += 1
            more = i + 1 < steps * LOOP
            s = start_product(k, q_view, q_full, count, more, 64, STAGES, OWN)
            dv, dk = hopper.warpgroup_mma_wait(1, deps=[dv, dk])
            mbarrier.arrive(empty.index(stage), count=1)
            s = hopper.warpgroup_mma_wait(0, deps=[s])
        if PLACES == 1:
            store_block(dv_desc, dv.to(dtype), out_view, out_ring, SIDE, block, kv_head, D)
            store_block(
                dk_desc, (dk * scale).to(dtype), out_view, out_ring, SIDE, block, kv_head, D
            )
        else:
            k.store((dk * scale).to(dtype))
            v.store(dv.to(dtype))
            hopper.fence_async_shared()
            # A block without a partner stands twice: its copy has no entries and is not stored.
            if (SIDE == 0) | (block0 != block1):
                for panel in gl.static_range(PANELS):
                    at = (kv_at * 2 + SIDE) * PANELS + panel
                    col = kv_head * D + panel * 64
                    tma_store(dk_desc, [block * 64, col], k_ring.index(at))
                    tma_store(dv_desc, [block * 64, col], v_ring.index(at))
        turn += 1
        kv_head = kv_head_
        block0 = block0_
        block1 = block1_
        first = first_
        steps = steps_
        first_kind = first_kind_
        masked = masked_
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "q_len", "k_len"])
def dkv_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, lse_ptr, delta_ptr,
    cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr, counter_ptr,
    num_items, q_len, k_len, q_pad, scale_log2, scale, interval_stride,
    REPEAT: gl.constexpr, TOGETHER: gl.constexpr, LOOP: gl.constexpr, GROUP: gl.constexpr,
    HEADS_PER_MASK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
    PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Split the program into loading warps and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    RINGS: gl.constexpr = 2 if NARROW else 1
    READERS: gl.constexpr = 1 if NARROW else 2
    SLOTS: gl.constexpr = RINGS * STAGES
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [SLOTS * PANELS, 64, 64], PANEL)
    do_ring = gl.allocate_shared_memory(dtype, [SLOTS * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [2 * PLACES * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [2 * PLACES * PANELS, 64, 64], PANEL)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stats = gl.allocate_shared_memory(gl.float32, [SLOTS * 2, 64], FLAT)
    q_view = reinterpret(q_ring, dtype, [SLOTS, 64, D], PANEL)
    do_view = reinterpret(do_ring, dtype, [SLOTS, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [2 * PLACES, 64, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [2 * PLACES, 64, D], PANEL)
    # Results leave from the place of their keys and values, or from one of their own where these
    # have but one.
    out_ring = k_ring
    out_view = k_view
    if PLACES == 1:
        out_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
        out_view = reinterpret(out_ring, dtype, [2, 64, D], PANEL)
    kv_full = gl.allocate_shared_memory(gl.int64, [RINGS * PLACES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [RINGS * PLACES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    board = gl.allocate_shared_memory(gl.int32, [4 * RINGS, 1], FLAT)
    posted = gl.allocate_shared_memory(gl.int64, [4 * RINGS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4 * RINGS):
        mbarrier.init(posted.index(i), count=1)
    for i in gl.static_range(RINGS * PLACES):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=READERS)
    for i in gl.static_range(SLOTS):
        # The loading warp arrives twice: for the bytes of q, and for lse and delta that it stores.
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    hopper.fence_async_shared()
    bars = (kv_full, kv_empty, q_full, do_full, empty)
    loads = (
        q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, cols_ptr, entries_ptr, counter_ptr,
    )  # fmt: skip
    rings = (q_ring, do_ring, k_ring, v_ring, stats, board, posted)
    load_sizes = (num_items, q_pad)
    tables = (dk_desc, dv_desc, cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (num_items, q_len, k_len, scale_log2, scale, interval_stride)
    smem = (
        q_view, do_view, k_view, v_view, k_ring, v_ring, out_view, out_ring, stats, board, posted,
    )  # fmt: skip
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    if NARROW:
        gl.warp_specialize(
            [
                (compute_partition, (tables, sizes, smem, bars, FIRST, REPEAT, TOGETHER, LOOP,
                                     GROUP, HEADS_PER_MASK, D, STAGES, PLACES, PAIRS, HAS_BITS,
                                    NARROW)),
                (compute_partition, (tables, sizes, smem, bars, SECOND, REPEAT, TOGETHER, LOOP,
                                     GROUP, HEADS_PER_MASK, D, STAGES, PLACES, PAIRS, HAS_BITS,
                                    NARROW)),
                (load_partition, (loads, load_sizes, rings, bars, FIRST, REPEAT, TOGETHER, LOOP,
                                  GROUP, D, STAGES, PLACES, NARROW)),
                (load_partition, (loads, load_sizes, rings, bars, SECOND, REPEAT, TOGETHER, LOOP,
                                  GROUP, D, STAGES, PLACES, NARROW)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (compute_partition, (tables, sizes, smem, bars, FIRST, REPEAT, TOGETHER, LOOP,
                                     GROUP, HEADS_PER_MASK, D, STAGES, PLACES, PAIRS, HAS_BITS,
                                    NARROW)),
                (compute_partition, (tables, sizes, smem, bars, SECOND, REPEAT, TOGETHER, LOOP,
                                     GROUP, HEADS_PER_MASK, D, STAGES, PLACES, PAIRS, HAS_BITS,
                                    NARROW)),
                (load_partition, (loads, load_sizes, rings, bars, FIRST, REPEAT, TOGETHER, LOOP,
                                  GROUP, D, STAGES, PLACES, NARROW)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def dkv_arguments(
    tensors: tuple[Tensor, ...], dk: Tensor, dv: Tensor, lists: BlockLists, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `dkv_kernel` is launched with; lse in powers of two and delta are padded to blocks."""
    q, k, v, dout, lse, delta = tensors
    bits = lists.intervals if lists.bits is None else lists.bits
    per_query_head = lists.num_mask_heads != lists.num_mask_kv_heads
    group = q.shape[1] // k.shape[1]
    repeat = k.shape[1] // lists.num_mask_kv_heads
    cols, col_entries, col_kinds = lists.walked_cols
    narrow = lists.narrow is not None
    args = (
        panels(q), panels(k), panels(v), panels(dout), panels(dk), panels(dv), lse, delta,
        cols, col_entries, col_kinds, lists.intervals, bits,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        cols.shape[0] * repeat, lists.q_len, lists.k_len, lse.shape[1], scale * LOG2_E, scale,
        lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0,
    )  # fmt: skip
    names = {
        "REPEAT": repeat,
        "TOGETHER": heads_together(repeat, 1) if lists.num_mask_kv_heads == 1 else repeat,
        "LOOP": 1 if per_query_head else group,
        "GROUP": group,
        "HEADS_PER_MASK": q.shape[1] // lists.num_mask_heads,
        "D": q.shape[2],
        "STAGES": (2 if narrow else 3) * (128 // q.shape[2]),
        "PLACES": 1 if narrow else 2,
        "PAIRS": lists.num_intervals,
        "HAS_BITS": lists.bits is not None,
        "NARROW": narrow,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, names


def key_gradients(
    tensors: tuple[Tensor, ...], dk: Tensor, dv: Tensor, lists: BlockLists, scale: float
) -> None:
    """Write dk and dv of the listed columns from (q, k, v, dout, lse, delta)."""
    args, names = dkv_arguments(tensors, dk, dv, lists, scale)
    programs = min(num_multiprocessors(dk.device.index or 0), args[14])
    dkv_kernel[(programs,)](*args, **names)
