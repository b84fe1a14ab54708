"""Block-sparse backward for Hopper in Gluon: one pass over the columns, five matrix products a tile.

A program owns two key blocks of 64 (one a warpgroup, not necessarily neighbours) and walks the query
blocks that read them. Scores are computed transposed, keys by queries, so that probabilities and
their gradients stay in registers as operands of dv and dk. For dq the two warpgroups exchange their
halves through shared memory, each multiplies one half of the head dim, and TMA adds the
product to a float32 workspace. The workspace serves a few heads at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dist_attn_kernels.block_sparse_hopper import (
    LOG2_E,
    num_multiprocessors,
    panels,
    score_mask,
)
from dist_attn_kernels.gluon_compat import reinterpret, tma_add, tma_load
from dist_attn_kernels.lists import BLOCK, COLUMN_HEADS, BlockLists


@gluon.jit
def snake(turn, num_items):
    """The item of a program's turn; every other turn runs backwards, so that long items even out."""
    programs = gl.num_programs(0)
    pid = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, pid, programs - 1 - pid)


@gluon.jit
def load_partition(
    loads, sizes, smem, bars, PER_HEAD: gl.constexpr,
    LOOP: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the keys and values of every item and the queries of its steps."""
    q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, cols_ptr, entries_ptr = loads
    num_items, item_offset, repeat, kv_offset, q_pad = sizes
    q_ring, do_ring, k_ring, v_ring, stats = smem
    kv_full, kv_empty, q_full, do_full, empty = bars
    PANELS: gl.constexpr = D // 64
    FLAT: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    offsets = gl.arange(0, 64, FLAT)
    count = 0
    turn = 0
    index = snake(turn, num_items)
    while index < num_items:
        item = cols_ptr + (item_offset + index // repeat) * 7
        kv_head = gl.load(item) if PER_HEAD else kv_offset + index % repeat
        block0 = gl.load(item + 1) * 64
        block1 = gl.load(item + 2) * 64
        first = gl.load(item + 3)
        steps = gl.load(item + 4) * LOOP
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        mbarrier.expect(kv_full, 2 * 128 * D * 2)
        for p in gl.static_range(PANELS):
            col = kv_head * D + p * 64
            tma_load(k_desc, [block0, col], kv_full, k_ring.index(p))
            tma_load(k_desc, [block1, col], kv_full, k_ring.index(PANELS + p))
            tma_load(v_desc, [block0, col], kv_full, v_ring.index(p))
            tma_load(v_desc, [block1, col], kv_full, v_ring.index(PANELS + p))
        for i in range(steps):
            entry = gl.load(entries_ptr + first + i // LOOP)
            head = kv_head * GROUP + i % LOOP + (entry >> 24)
            row = (entry & 0xFFFFFF) * 64
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), 64 * D * 2)
            for p in gl.static_range(PANELS):
                panel = q_ring.index(stage * PANELS + p)
                tma_load(q_desc, [row, head * D + p * 64], q_full.index(stage), panel)
            mbarrier.expect(do_full.index(stage), 64 * D * 2)
            for p in gl.static_range(PANELS):
                panel = do_ring.index(stage * PANELS + p)
                tma_load(do_desc, [row, head * D + p * 64], do_full.index(stage), panel)
            at = head.to(gl.int64) * q_pad + row + offsets
            lse = gl.load(lse_ptr + at)
            delta = gl.load(delta_ptr + at)
            stats.index(stage * 2).store(lse)
            stats.index(stage * 2 + 1).store(delta)
            mbarrier.arrive(q_full.index(stage), count=1)
            count += 1
        turn += 1
        index = snake(turn, num_items)


@gluon.jit
def compute_partition(
    tables, sizes, smem, bars,
    SIDE: gl.constexpr, PER_HEAD: gl.constexpr, LOOP: gl.constexpr, GROUP: gl.constexpr,
    HEADS_PER_MASK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """The gradients of 64 keys and values, and half of the columns of dq."""
    dq_desc, dk_ptr, dv_ptr, cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr = tables
    num_items, item_offset, repeat, kv_offset, q_len, k_len, scale, dkv_stride, interval_stride = (
        sizes
    )
    q_view, do_view, k_view, v_view, k_ring, ds_smem, dq_view, dq_ring, stats = smem
    kv_full, kv_empty, q_full, do_full, empty, ds_full, ds_empty = bars
    PANELS: gl.constexpr = D // 64
    HALF: gl.constexpr = D // 2
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    MMA_D: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    MMA_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA_D, 2)
    COL: gl.constexpr = gl.SliceLayout(0, MMA_S)
    dtype: gl.constexpr = q_view.dtype
    scale_log2 = scale * 1.4426950408889634
    k = k_view.index(SIDE)
    v = v_view.index(SIDE)
    key_in = gl.arange(0, 64, gl.SliceLayout(1, MMA_S))
    count = 0
    turn = 0
    index = snake(turn, num_items)
    while index < num_items:
        item = cols_ptr + (item_offset + index // repeat) * 7
        kv_head = gl.load(item) if PER_HEAD else kv_offset + index % repeat
        block = gl.load(item + 1 + SIDE)
        alone = gl.load(item + 1) == gl.load(item + 2)
        first = gl.load(item + 3)
        steps = gl.load(item + 4) * LOOP
        first_kind = gl.load(item + 5)
        masked = gl.load(item + 6) * LOOP
        dk = gl.zeros([64, D], gl.float32, MMA_D)
        dv = gl.zeros([64, D], gl.float32, MMA_D)
        mbarrier.wait(kv_full, turn & 1)
        for i in range(steps):
            entry = gl.load(entries_ptr + first + i // LOOP)
            head = kv_head * GROUP + i % LOOP + (entry >> 24)
            row = (entry & 0xFFFFFF) * 64
            stage = count % STAGES
            phase = (count // STAGES) & 1
            zero = gl.zeros([64, 64], gl.float32, MMA_S)
            mbarrier.wait(q_full.index(stage), phase)
            s = hopper.warpgroup_mma(
                k, q_view.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            mbarrier.wait(do_full.index(stage), phase)
            dp = hopper.warpgroup_mma(
                v, do_view.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            lse = stats.index(stage * 2).load(COL)
            s = hopper.warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 0))
            if i < masked:
                kind = gl.load(kinds_ptr + (first_kind + i // LOOP) * 2 + SIDE)
                rows = gl.expand_dims(row + gl.arange(0, 64, COL), 0)
                bounds_ptr = intervals_ptr + (head // HEADS_PER_MASK) * interval_stride
                keep = score_mask(
                    kind, kind, rows, gl.expand_dims(block * 64 + key_in, 1),
                    gl.expand_dims(key_in, 1), q_len, k_len, bounds_ptr, bits_ptr, PAIRS, HAS_BITS,
                )  # fmt: skip
                p = gl.where(keep, p, 0.0)
            probs = gl.convert_layout(p.to(dtype), OPERAND)
            dp = hopper.warpgroup_mma_wait(0, deps=[dp])
            dv = hopper.warpgroup_mma(probs, do_view.index(stage), dv, is_async=True)
            delta = stats.index(stage * 2 + 1).load(COL)
            ds = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
            mbarrier.wait(ds_empty, (count & 1) ^ 1)
            ds_smem.index(SIDE).store(ds)
            hopper.fence_async_shared()
            mbarrier.arrive(ds_full, count=1)
            ds_operand = gl.convert_layout(ds, OPERAND)
            dk = hopper.warpgroup_mma(ds_operand, q_view.index(stage), dk, is_async=True)
            mbarrier.wait(ds_full, count & 1)
            zero_q = gl.zeros([64, HALF], gl.float32, MMA_Q)
            for j in gl.static_range(2):
                ds_t = ds_smem.index(j).permute((1, 0))
                if D == 64:
                    keys = k_ring.index(j).slice(SIDE * 32, 32, 1)
                else:
                    keys = k_ring.index(j * PANELS + SIDE)
                if j == 0:
                    dq = hopper.warpgroup_mma(ds_t, keys, zero_q, use_acc=False, is_async=True)
                else:
                    dq = hopper.warpgroup_mma(ds_t, keys, dq, is_async=True)
            # The workspace's last addition must have read shared memory before it is written again.
            tma.store_wait(0)
            dv, dk, dq = hopper.warpgroup_mma_wait(0, deps=[dv, dk, dq])
            mbarrier.arrive(ds_empty, count=1)
            mbarrier.arrive(empty.index(stage), count=1)
            dq_view.index(SIDE).store(dq)
            hopper.fence_async_shared()
            col = (head - kv_offset * GROUP) * D + SIDE * HALF
            for p_ in gl.static_range(HALF // 32):
                tma_add(dq_desc, [row, col + p_ * 32], dq_ring.index(SIDE * (HALF // 32) + p_))
            count += 1
        mbarrier.arrive(kv_empty, count=1)
        keys = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, MMA_D))
        live = (keys < k_len) & ((SIDE == 0) | (not alone))
        dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, MMA_D)), 0)
        at = gl.expand_dims(keys.to(gl.int64), 1) * dkv_stride + kv_head * D + dims
        gl.store(dk_ptr + at, (dk * scale).to(dtype), mask=gl.expand_dims(live, 1))
        gl.store(dv_ptr + at, dv.to(dtype), mask=gl.expand_dims(live, 1))
        turn += 1
        index = snake(turn, num_items)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_items", "item_offset", "repeat", "kv_offset", "q_len", "k_len"])
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_desc, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr,
    num_items, item_offset, repeat, kv_offset, q_len, k_len, q_pad, scale, dkv_stride, interval_stride,
    PER_HEAD: gl.constexpr, LOOP: gl.constexpr, GROUP: gl.constexpr, HEADS_PER_MASK: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """Split the program into the loading warp and the two computing warpgroups."""
    PANELS: gl.constexpr = D // 64
    PANEL: gl.constexpr = q_desc.layout
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 64, 64], PANEL)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES * PANELS, 64, 64], PANEL)
    k_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    v_ring = gl.allocate_shared_memory(dtype, [2 * PANELS, 64, 64], PANEL)
    ds_smem = gl.allocate_shared_memory(dtype, [2, 64, 64], PANEL)
    dq_ring = gl.allocate_shared_memory(gl.float32, [D // 32, 64, 32], dq_desc.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stats = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 64], FLAT)
    q_view = reinterpret(q_ring, dtype, [STAGES, 64, D], PANEL)
    do_view = reinterpret(do_ring, dtype, [STAGES, 64, D], PANEL)
    k_view = reinterpret(k_ring, dtype, [2, 64, D], PANEL)
    v_view = reinterpret(v_ring, dtype, [2, 64, D], PANEL)
    dq_view = reinterpret(dq_ring, gl.float32, [2, 64, D // 2], dq_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_empty, count=2)
    for i in gl.static_range(STAGES):
        # The loading warp arrives twice: for the bytes of q, and for lse and delta that it stores.
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    hopper.fence_async_shared()
    loads = (q_desc, k_desc, v_desc, do_desc, lse_ptr, delta_ptr, cols_ptr, entries_ptr)
    load_sizes = (num_items, item_offset, repeat, kv_offset, q_pad)
    load_smem = (q_ring, do_ring, k_ring, v_ring, stats)
    load_bars = (kv_full, kv_empty, q_full, do_full, empty)
    tables = (dq_desc, dk_ptr, dv_ptr, cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr)
    sizes = (
        num_items, item_offset, repeat, kv_offset, q_len, k_len, scale, dkv_stride, interval_stride
    )  # fmt: skip
    smem = (q_view, do_view, k_view, v_view, k_ring, ds_smem, dq_view, dq_ring, stats)
    bars = (kv_full, kv_empty, q_full, do_full, empty, ds_full, ds_empty)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                compute_partition,
                (
                    tables,
                    sizes,
                    smem,
                    bars,
                    FIRST,
                    PER_HEAD,
                    LOOP,
                    GROUP,
                    HEADS_PER_MASK,
                    D,
                    STAGES,
                    PAIRS,
                    HAS_BITS,
                ),
            ),
            (
                compute_partition,
                (
                    tables,
                    sizes,
                    smem,
                    bars,
                    SECOND,
                    PER_HEAD,
                    LOOP,
                    GROUP,
                    HEADS_PER_MASK,
                    D,
                    STAGES,
                    PAIRS,
                    HAS_BITS,
                ),
            ),
            (
                load_partition,
                (loads, load_sizes, load_smem, load_bars, PER_HEAD, LOOP, GROUP, D, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def prepare_kernel(
    lse_ptr, delta_ptr, lse_out_ptr, delta_out_ptr, q_len, q_pad, ROWS: tl.constexpr
):  # fmt: skip
    """lse in powers of two and delta, padded to whole blocks; +inf where no probability is left."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    lse = tl.load(lse_ptr + head * q_len + rows, mask=rows < q_len, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(lse_out_ptr + head * q_pad + rows, lse, mask=rows < q_pad)
    delta = tl.load(delta_ptr + head * q_len + rows, mask=rows < q_len, other=0.0)
    tl.store(delta_out_ptr + head * q_pad + rows, delta, mask=rows < q_pad)


@triton.jit
def scale_kernel(
    work_ptr,
    dq_ptr,
    scale,
    q_len,
    width,
    work_stride,
    dq_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dq of some heads from their float32 workspace [queries, width]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (rows < q_len)[:, None] & (cols < width)[None, :]
    at = rows.to(tl.int64)[:, None]
    work = tl.load(work_ptr + at * work_stride + cols[None, :], mask=inside, other=0.0)
    dq = (work * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at * dq_stride + cols[None, :], dq, mask=inside)


@functools.lru_cache(maxsize=1)
def _work_layout() -> Any:
    return gl.NVMMASharedLayout.get_default_for([BLOCK, 32], gl.float32)


def backward_arguments(
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor],
    work: Tensor,
    lists: BlockLists,
    scale: float,
) -> tuple[list[Any], dict[str, Any]]:
    """What `backward_kernel` is launched with; the caller sets the four numbers of each group of heads."""
    q, k, v, dout, lse, delta = tensors
    _, dk, dv = grads
    bits = lists.intervals if lists.bits is None else lists.bits
    per_query_head = lists.num_mask_heads != lists.num_mask_kv_heads
    group = q.shape[1] // k.shape[1]
    args = [
        panels(q), panels(k), panels(v), panels(dout),
        TensorDescriptor.from_tensor(work, [BLOCK, 32], _work_layout()), lse, delta, dk, dv,
        lists.cols, lists.col_entries, lists.col_kinds, lists.intervals, bits,
        0, 0, 1, 0, lists.q_len, lists.k_len, lse.shape[1], scale, dk.stride(0),
        lists.intervals.stride(0) if lists.intervals.shape[0] > 1 else 0,
    ]  # fmt: skip
    names = {
        "PER_HEAD": lists.num_mask_kv_heads > 1,
        "LOOP": 1 if per_query_head else group,
        "GROUP": group,
        "HEADS_PER_MASK": q.shape[1] // lists.num_mask_heads,
        "D": q.shape[2],
        "STAGES": 2,
        "PAIRS": lists.num_intervals,
        "HAS_BITS": lists.bits is not None,
        "num_warps": 4,
        "maxnreg": 168,
    }
    return args, names


def backward(
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    scale: float,
) -> None:
    """Write dq, dk and dv of everything listed; (q, k, v, dout, lse, delta) as `block_sparse_backward`."""
    q, k, v, dout, lse, delta = tensors
    dq = grads[0]
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    group = heads // kv_heads
    pad = triton.cdiv(lists.q_len, BLOCK) * BLOCK
    stats = torch.empty(2, heads, pad, dtype=torch.float32, device=q.device)
    rows = 256
    prepare_kernel[(triton.cdiv(pad, rows), heads)](
        lse, delta, stats[0], stats[1], lists.q_len, pad, ROWS=rows
    )
    per_launch = min(COLUMN_HEADS, kv_heads)
    work = torch.empty(lists.q_len, per_launch * group * dim, dtype=torch.float32, device=q.device)
    tensors = (q, k, v, dout, stats[0], stats[1])
    args, names = backward_arguments(tensors, grads, work, lists, scale)
    shared_mask = lists.num_mask_kv_heads == 1
    for kv_first in range(0, kv_heads, per_launch):
        kv_last = min(kv_first + per_launch, kv_heads)
        begin, end = 0, lists.cols.shape[0]
        if not shared_mask:
            begin = lists.col_starts[kv_first // COLUMN_HEADS]
            end = lists.col_starts[kv_first // COLUMN_HEADS + 1]
        repeat = kv_last - kv_first if shared_mask else 1
        work.zero_()
        num_items = (end - begin) * repeat
        # A table with a head per row names the head itself; a shared one is repeated for each head.
        args[14:18] = [num_items, begin, repeat, kv_first]
        if num_items:
            backward_kernel[(min(num_multiprocessors(q.device.index or 0), num_items),)](
                *args, **names
            )
        first, width = kv_first * group, (kv_last - kv_first) * group * dim
        part = dq[:, first : first + width // dim]
        scale_kernel[(triton.cdiv(lists.q_len, 32), triton.cdiv(width, 128))](
            work, part, scale, lists.q_len, width, work.stride(0), dq.stride(0), ROWS=32, WIDTH=128
        )
