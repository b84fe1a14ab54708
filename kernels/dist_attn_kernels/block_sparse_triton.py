"""Block-sparse attention in plain Triton: every GPU that Triton serves, and its interpreter.

Forward and backward walk the tables of `lists.py`. The backward has two passes, one that owns keys
(dk, dv) and one that owns queries (dq): nothing is added atomically, so results repeat bit by bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0917 - a kernel takes its pointers by position.
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
#: A token of a head of 128 in 16 bits: what every kernel holds twice over.
NARROW_ROW_BYTES = 256
#: Shared memory of a program on the two generations that the kernels are compiled for in the tests.
A100_SHARED_BYTES = 166912
H100_SHARED_BYTES = 232448


def pipeline_stages(row_bytes: int, kind: str, shared_bytes: int) -> int:
    """How many steps the Triton kernels fetch ahead, by what shared memory holds.

    Raises:
        ValueError: not even one.
    """
    if row_bytes <= NARROW_ROW_BYTES:
        return 2 if shared_bytes >= A100_SHARED_BYTES else 1
    if row_bytes <= 2 * NARROW_ROW_BYTES:
        if shared_bytes >= H100_SHARED_BYTES:
            return 2 if kind == "forward" else 1
        if kind == "forward" and shared_bytes >= A100_SHARED_BYTES:
            return 1
    raise ValueError(
        f"a {kind} with {row_bytes} bytes a token and head does not fit {shared_bytes} bytes of "
        f"shared memory; use float16 or bfloat16 and a head_dim of at most 128, or a GPU with "
        f"{H100_SHARED_BYTES} bytes for up to {2 * NARROW_ROW_BYTES} bytes a token"
    )


@triton.jit
def in_interval(key, bounds_ptr, row, q_len, inside, PAIRS: tl.constexpr):
    """Whether each key lies in one of its query's intervals; `row` and `key` broadcast."""
    low = tl.load(bounds_ptr + row, mask=inside, other=0)
    high = tl.load(bounds_ptr + q_len + row, mask=inside, other=0)
    seen = (key >= low) & (key < high)
    if PAIRS == 2:
        low = tl.load(bounds_ptr + 2 * q_len + row, mask=inside, other=0)
        high = tl.load(bounds_ptr + 3 * q_len + row, mask=inside, other=0)
        seen = seen | ((key >= low) & (key < high))
    return seen


@triton.jit
def by_kind(kind, seen, bits_ptr, row, col, HAS_BITS: tl.constexpr):
    """Apply the kinds of tiles to scores; `row` and `col` are positions inside the 64x64 tile."""
    keep = (kind == 1) | ((kind == 2) & seen)
    if HAS_BITS:
        word = tl.load(bits_ptr + ((kind - 3) * 64 + row) * 2 + col // 32, mask=kind >= 3, other=0)
        keep = keep | ((kind >= 3) & (((word >> (col % 32)) & 1) == 1))
    return keep


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr,
    q_len, k_len, scale_log2,
    q_stride, k_stride, v_stride, out_stride, interval_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PER_STEP: tl.constexpr,
    PAIRS: tl.constexpr, HAS_BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of 128 queries of one head: masked steps, then full ones."""
    REPEAT: tl.constexpr = HEADS // MASK_HEADS
    item = rows_ptr + (tl.program_id(0) // REPEAT) * 6
    mask_head = tl.load(item)
    head = mask_head * REPEAT + tl.program_id(0) % REPEAT
    first = tl.load(item + 2)
    steps = tl.load(item + 3)
    first_kind = tl.load(item + 4)
    masked = tl.load(item + 5)
    rows = tl.load(item + 1) * 128 + tl.arange(0, 128)
    dims = tl.arange(0, BLOCK_D)
    row_in = rows < q_len
    at = rows.to(tl.int64)[:, None] * q_stride + head * D + dims[None, :]
    q = tl.load(q_ptr + at, mask=row_in[:, None] & (dims < D)[None, :], other=0.0)
    bounds_ptr = intervals_ptr + mask_head * interval_stride
    k_ptr += (head // GROUP) * D
    v_ptr += (head // GROUP) * D
    top = tl.full([128], float("-inf"), tl.float32)
    total = tl.zeros([128], tl.float32)
    acc = tl.zeros([128, BLOCK_D], tl.float32)
    cols = tl.arange(0, 64 * PER_STEP)
    lower = (tl.arange(0, 128) // 64)[:, None]
    for i in range(0, masked * (2 // PER_STEP)):
        step = i // (2 // PER_STEP)
        half = i % (2 // PER_STEP) + cols // 64
        block = tl.load(blocks_ptr + (first + step) * 2 + half)
        keys = block * 64 + cols % 64
        kind = tl.load(kinds_ptr + (first_kind + step) * 4 + lower * 2 + half[None, :])
        seen = in_interval(keys[None, :], bounds_ptr, rows[:, None], q_len, row_in[:, None], PAIRS)
        keep = by_kind(kind, seen, bits_ptr, rows[:, None] % 64, cols[None, :] % 64, HAS_BITS)
        key_in = (keys < k_len)[:, None] & (dims < D)[None, :]
        k = tl.load(
            k_ptr + keys.to(tl.int64)[:, None] * k_stride + dims[None, :], mask=key_in, other=0.0
        )
        v = tl.load(
            v_ptr + keys.to(tl.int64)[:, None] * v_stride + dims[None, :], mask=key_in, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(keep & (keys < k_len)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - safe_top[:, None])
        alpha = tl.exp2(top - safe_top)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        top = new_top
    for i in range(masked * (2 // PER_STEP), steps * (2 // PER_STEP)):
        step = i // (2 // PER_STEP)
        half = i % (2 // PER_STEP) + cols // 64
        keys = tl.load(blocks_ptr + (first + step) * 2 + half) * 64 + cols % 64
        dim_in = (dims < D)[None, :]
        k = tl.load(
            k_ptr + keys.to(tl.int64)[:, None] * k_stride + dims[None, :], mask=dim_in, other=0.0
        )
        v = tl.load(
            v_ptr + keys.to(tl.int64)[:, None] * v_stride + dims[None, :], mask=dim_in, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = rows.to(tl.int64)[:, None] * out_stride + head * D + dims[None, :]
    tl.store(
        out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=row_in[:, None] & (dims < D)[None, :]
    )
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head.to(tl.int64) * q_len + rows, lse, mask=row_in)


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, q_len, out_stride, dout_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DLSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The term of the softmax's gradient that a query shares: sum of out * dout, less dlse."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    inside = (rows < q_len)[:, None] & (dims < D)[None, :]
    at = rows.to(tl.int64)[:, None] * out_stride + head * D + dims[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * dout_stride + head * D + dims[None, :]
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    at = head.to(tl.int64) * q_len + rows
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=rows < q_len, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < q_len)


@triton.jit
def pad_kernel(
    lse_ptr, delta_ptr, lse_out_ptr, delta_out_ptr, q_len, q_pad, ROWS: tl.constexpr
):  # fmt: skip
    """Lse in powers of two and delta, padded to whole blocks; +inf where no probability is left."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    lse = tl.load(lse_ptr + head * q_len + rows, mask=rows < q_len, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    tl.store(lse_out_ptr + head * q_pad + rows, lse, mask=rows < q_pad)
    delta = tl.load(delta_ptr + head * q_len + rows, mask=rows < q_len, other=0.0)
    tl.store(delta_out_ptr + head * q_pad + rows, delta, mask=rows < q_pad)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    rows_ptr, blocks_ptr, kinds_ptr, intervals_ptr, bits_ptr,
    q_len, k_len, scale,
    q_stride, k_stride, v_stride, dout_stride, dq_stride, interval_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PER_STEP: tl.constexpr,
    PAIRS: tl.constexpr, HAS_BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query gradient of one tile of 128 queries of one head."""
    REPEAT: tl.constexpr = HEADS // MASK_HEADS
    item = rows_ptr + (tl.program_id(0) // REPEAT) * 6
    mask_head = tl.load(item)
    head = mask_head * REPEAT + tl.program_id(0) % REPEAT
    first = tl.load(item + 2)
    steps = tl.load(item + 3)
    first_kind = tl.load(item + 4)
    masked = tl.load(item + 5)
    rows = tl.load(item + 1) * 128 + tl.arange(0, 128)
    dims = tl.arange(0, BLOCK_D)
    row_in = rows < q_len
    dim_in = (dims < D)[None, :]
    tile_in = row_in[:, None] & dim_in
    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * q_stride + head * D + dims[None, :],
        mask=tile_in,
        other=0.0,
    )
    do = tl.load(
        dout_ptr + rows.to(tl.int64)[:, None] * dout_stride + head * D + dims[None, :],
        mask=tile_in,
        other=0.0,
    )
    at = head.to(tl.int64) * q_len + rows
    lse = tl.load(lse_ptr + at, mask=row_in, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
    delta = tl.load(delta_ptr + at, mask=row_in, other=0.0)
    bounds_ptr = intervals_ptr + mask_head * interval_stride
    k_ptr += (head // GROUP) * D
    v_ptr += (head // GROUP) * D
    acc = tl.zeros([128, BLOCK_D], tl.float32)
    cols = tl.arange(0, 64 * PER_STEP)
    lower = (tl.arange(0, 128) // 64)[:, None]
    for i in range(0, steps * (2 // PER_STEP)):
        step = i // (2 // PER_STEP)
        half = i % (2 // PER_STEP) + cols // 64
        keys = tl.load(blocks_ptr + (first + step) * 2 + half) * 64 + cols % 64
        key_in = (keys < k_len)[:, None] & dim_in
        k = tl.load(
            k_ptr + keys.to(tl.int64)[:, None] * k_stride + dims[None, :], mask=key_in, other=0.0
        )
        v = tl.load(
            v_ptr + keys.to(tl.int64)[:, None] * v_stride + dims[None, :], mask=key_in, other=0.0
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.exp2(s - lse[:, None])
        if step < masked:
            kind = tl.load(kinds_ptr + (first_kind + step) * 4 + lower * 2 + half[None, :])
            seen = in_interval(
                keys[None, :], bounds_ptr, rows[:, None], q_len, row_in[:, None], PAIRS
            )
            keep = by_kind(kind, seen, bits_ptr, rows[:, None] % 64, cols[None, :] % 64, HAS_BITS)
            p = tl.where(keep & (keys < k_len)[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    at = rows.to(tl.int64)[:, None] * dq_stride + head * D + dims[None, :]
    tl.store(dq_ptr + at, (acc * scale).to(dq_ptr.dtype.element_ty), mask=tile_in)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cols_ptr, entries_ptr, kinds_ptr, intervals_ptr, bits_ptr,
    q_len, k_len, scale,
    q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride, interval_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MASK_KV_HEADS: tl.constexpr,
    HEADS_PER_MASK: tl.constexpr, LOOP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, HAS_BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The key and value gradients of two key blocks, over every query head that reads them."""
    REPEAT: tl.constexpr = KV_HEADS // MASK_KV_HEADS
    item = cols_ptr + (tl.program_id(0) // REPEAT) * 7
    kv_head = tl.load(item) * REPEAT + tl.program_id(0) % REPEAT
    side = tl.arange(0, 128) // 64
    block = tl.load(item + 1 + side)
    first = tl.load(item + 3)
    count = tl.load(item + 4)
    first_kind = tl.load(item + 5)
    masked = tl.load(item + 6)
    # A block without a partner stands twice: its copy has no entries and is not stored.
    alone = tl.load(item + 1) == tl.load(item + 2)
    keys = block * 64 + tl.arange(0, 128) % 64
    dims = tl.arange(0, BLOCK_D)
    dim_in = (dims < D)[None, :]
    key_in = (keys < k_len)[:, None] & dim_in
    k = tl.load(
        k_ptr + keys.to(tl.int64)[:, None] * k_stride + kv_head * D + dims[None, :],
        mask=key_in,
        other=0.0,
    )
    v = tl.load(
        v_ptr + keys.to(tl.int64)[:, None] * v_stride + kv_head * D + dims[None, :],
        mask=key_in,
        other=0.0,
    )
    dk = tl.zeros([128, BLOCK_D], tl.float32)
    dv = tl.zeros([128, BLOCK_D], tl.float32)
    for i in range(0, count * LOOP):
        entry = tl.load(entries_ptr + first + i // LOOP)
        head = kv_head * GROUP + i % LOOP + (entry >> 24)
        rows = (entry & 0xFFFFFF) * 64 + tl.arange(0, 64)
        row_in = rows < q_len
        tile_in = row_in[:, None] & dim_in
        q = tl.load(
            q_ptr + rows.to(tl.int64)[:, None] * q_stride + head * D + dims[None, :],
            mask=tile_in,
            other=0.0,
        )
        do = tl.load(
            dout_ptr + rows.to(tl.int64)[:, None] * dout_stride + head * D + dims[None, :],
            mask=tile_in,
            other=0.0,
        )
        at = head.to(tl.int64) * q_len + rows
        lse = tl.load(lse_ptr + at, mask=row_in, other=float("inf"))
        lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
        delta = tl.load(delta_ptr + at, mask=row_in, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.exp2(s - lse[None, :])
        if i // LOOP < masked:
            kind = tl.load(kinds_ptr + (first_kind + i // LOOP) * 2 + side)[:, None]
            bounds_ptr = intervals_ptr + (head // HEADS_PER_MASK) * interval_stride
            seen = in_interval(
                keys[:, None], bounds_ptr, rows[None, :], q_len, row_in[None, :], PAIRS
            )
            keep = by_kind(kind, seen, bits_ptr, rows[None, :] % 64, keys[:, None] % 64, HAS_BITS)
            p = tl.where(keep & (keys < k_len)[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    key_in = key_in & ((side == 0) | (not alone))[:, None]
    at = keys.to(tl.int64)[:, None] * dk_stride + kv_head * D + dims[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=key_in)
    at = keys.to(tl.int64)[:, None] * dv_stride + kv_head * D + dims[None, :]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=key_in)
