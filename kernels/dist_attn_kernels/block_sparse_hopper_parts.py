"""What the Gluon kernels for Hopper share: items, loads, masks, products and TMA descriptors.

Shared memory holds panels of 64 tokens by 64 elements of the head (128 bytes a row, the widest
swizzle), so that every block of every operand is one piece that TMA writes and wgmma reads.

Items are drawn from a counter in device memory: a program takes the next one when it is ready, so
that long and short items, which lie longest first in the tables, even out.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: PLR0917 - a kernel takes its pointers by position.
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dist_attn_kernels.gluon_compat import tma_load
from dist_attn_kernels.lists import BLOCK

LOG2_E = 1.4426950408889634


@gluon.jit
def score_mask(
    kind0, kind1, rows, keys, cols, q_len, k_len, bounds_ptr, bits_ptr,
    PAIRS: gl.constexpr, HAS_BITS: gl.constexpr,
):  # fmt: skip
    """Which scores count, for two tiles of kinds `kind0` and `kind1` side by side along the keys.

    `rows`, `keys` and `cols` (a key's place in the pair, 0..127, or in its tile for a single one)
    are already expanded so that they broadcast against each other.
    """
    inside = rows < q_len
    low = gl.load(bounds_ptr + rows, mask=inside, other=0)
    high = gl.load(bounds_ptr + q_len + rows, mask=inside, other=0)
    seen = (keys >= low) & (keys < high)
    if PAIRS == 2:
        low = gl.load(bounds_ptr + 2 * q_len + rows, mask=inside, other=0)
        high = gl.load(bounds_ptr + 3 * q_len + rows, mask=inside, other=0)
        seen = seen | ((keys >= low) & (keys < high))
    kind = gl.where(cols < 64, kind0, kind1)
    keep = (kind == 1) | ((kind == 2) & seen)
    if HAS_BITS:
        tile = gl.maximum(kind - 3, 0)
        word = gl.load(bits_ptr + (tile * 64 + rows % 64) * 2 + (cols % 64) // 32)
        keep = keep | ((kind >= 3) & (((word >> (cols % 32)) & 1) == 1))
    return keep & (keys < k_len)


@gluon.jit
def post_item(counter_ptr, board, posted, turn, WALKERS: gl.constexpr, SIDE: gl.constexpr):
    """Draw the next item and post it for the computing warpgroups.

    WALKERS sides of a program walk items of their own, SIDE is one of them; 1 if both walk one.

    It is drawn one item ahead of use. The board has four places and needs no answer: the loads of
    an item wait for the item two before it, so that no place is written before it was read.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.atomic_add(counter_ptr, 1) + gl.num_programs(0) * WALKERS
    place = SIDE * 4 + turn % 4
    board.index(place).store(gl.full([1], 0, gl.int32, FLAT) + index)
    mbarrier.arrive(posted.index(place), count=1)
    return index


@gluon.jit
def read_item(board, posted, turn, SIDE: gl.constexpr):
    """The item that `post_item` drew for this turn."""
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = SIDE * 4 + turn % 4
    mbarrier.wait(posted.index(place), (turn // 4) & 1)
    return gl.sum(board.index(place).load(FLAT), 0)


@gluon.jit
def place_item(index, num_items, REPEAT: gl.constexpr, TOGETHER: gl.constexpr):
    """The table's row and the head inside its mask head: TOGETHER heads walk the table at a time.

    Past the last item the last one is named again, so that a program can look one item ahead.
    """
    index = gl.minimum(index, num_items - 1)
    per_group = num_items // (REPEAT // TOGETHER)
    inside = index % per_group
    return inside // TOGETHER, index // per_group * TOGETHER + inside % TOGETHER


@gluon.jit
def load_item(
    rows_ptr, index, num_items,
    REPEAT: gl.constexpr, TOGETHER: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Head, mask head, first query, first step, steps, first kind, masked steps of an item."""
    place, head_in_mask = place_item(index, num_items, REPEAT, TOGETHER)
    item = rows_ptr + place * 6
    mask_head = gl.load(item)
    head = mask_head * REPEAT + head_in_mask
    row = gl.load(item + 1) * QUERIES
    return (
        head,
        mask_head,
        row,
        gl.load(item + 2),
        gl.load(item + 3),
        gl.load(item + 4),
        gl.load(item + 5),
    )


@gluon.jit
def load_step(
    desc, ring, stage, block0, block1, col, bar, D: gl.constexpr, WIDTH: gl.constexpr
):  # fmt: skip
    """Fetch a block of 64 tokens, or two as one operand of 128, into a stage of the ring."""
    mbarrier.expect(bar, WIDTH * D * 2)
    per_panel: gl.constexpr = WIDTH // 64
    first = stage * (per_panel * (D // 64))
    for p in gl.static_range(D // 64):
        tma_load(desc, [block0, col + p * 64], bar, ring.index(first + p * per_panel))
        if per_panel == 2:
            tma_load(desc, [block1, col + p * 64], bar, ring.index(first + p * per_panel + 1))


@gluon.jit
def step_blocks(blocks_ptr, step, WIDTH: gl.constexpr):
    """First tokens of the one or two key blocks of a step."""
    block0 = gl.load(blocks_ptr + step * (WIDTH // 64)) * 64
    block1 = block0
    if WIDTH == 128:
        block1 = gl.load(blocks_ptr + step * 2 + 1) * 64
    return block0, block1


@gluon.jit
def masked_scores(
    s, rows, blocks_ptr, kinds_ptr, step, kind_step, q_len, k_len, bounds_ptr, bits_ptr,
    SIDE: gl.constexpr, PAIRS: gl.constexpr, HAS_BITS: gl.constexpr, MMA: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """The scores of a masked step, -inf where they do not count."""
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, MMA))
    block0, block1 = step_blocks(blocks_ptr, step, WIDTH)
    kind0 = gl.load(kinds_ptr + kind_step * (4 if WIDTH == 128 else 1) + SIDE * 2)
    kind1 = kind0
    if WIDTH == 128:
        kind1 = gl.load(kinds_ptr + kind_step * 4 + SIDE * 2 + 1)
    keys = gl.where(cols < 64, block0, block1) + cols % 64
    keep = score_mask(
        kind0, kind1, gl.expand_dims(rows, 1), gl.expand_dims(keys, 0), gl.expand_dims(cols, 0),
        q_len, k_len, bounds_ptr, bits_ptr, PAIRS, HAS_BITS,
    )  # fmt: skip
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def start_product(
    left, view, full, count, more, WIDTH: gl.constexpr, STAGES: gl.constexpr, RING: gl.constexpr
):  # fmt: skip
    """Issue left @ right^T with the operand of step `count`; `more` says whether there is one.

    The ring is the RING-th of STAGES stages. Behind the last step it multiplies whatever the next
    stage holds; nobody looks at the result.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    stage = RING * STAGES + count % STAGES
    mbarrier.wait(full.index(stage), (count // STAGES) & 1, pred=more)
    right = view.index(stage).permute((1, 0))
    zero = gl.zeros([64, WIDTH], gl.float32, MMA)
    return hopper.warpgroup_mma(left, right, zero, use_acc=False, is_async=True)


@functools.lru_cache(maxsize=16)
def panel_layout(dtype: torch.dtype) -> Any:
    """Shared memory of a 64x64 panel of 16-bit numbers."""
    name = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK], name)


@functools.lru_cache(maxsize=64)
def num_multiprocessors(index: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def heads_together(repeat: int, group: int) -> int:
    """How many of a shared mask's heads walk its table at a time: few, so that L2 serves them."""
    return next((n for n in range(4, repeat) if repeat % n == 0 and n % group == 0), repeat)


def panels(t: Tensor) -> Any:
    """A TMA descriptor that reads [tokens, heads, head_dim] in panels of 64 x 64."""
    flat = t.as_strided((t.shape[0], t.shape[1] * t.shape[2]), (t.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [BLOCK, BLOCK], panel_layout(t.dtype))
