"""Putting two halves of the heads together, and adding what belongs to some of the rows.

On a GPU one kernel reads every part once and writes the result; elsewhere torch operations do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of one program; a row of all heads may take several.
_BLOCK = 2048


def join_heads(
    first_LhD: Tensor, second_LhD: Tensor, rest_nHD: Tensor | None, first_row: int
) -> Tensor:
    """Concatenate two tensors by heads, and add to some rows in sequence.

    Args:
        first_LhD: the first heads, [L, h, D], contiguous inside a row.
        second_LhD: the other heads, of the same dtype.
        rest_nHD: what is added to rows `first_row` to `first_row` + n, of any floating-point dtype,
            contiguous inside a row; or None.
        first_row: its place.

    Returns:
        [L, H, D] of the dtype of the halves.

    Numerics:
        A sum is rounded once.
    """
    if first_LhD.is_cuda and first_LhD.dtype != torch.float64:
        num_heads = first_LhD.shape[1] + second_LhD.shape[1]
        joined = first_LhD.new_empty(len(first_LhD), num_heads, first_LhD.shape[2])
        _join_on_gpu(joined, first_LhD, second_LhD, rest_nHD, first_row)
        return joined
    joined = torch.cat([first_LhD, second_LhD], dim=1)
    if rest_nHD is not None:
        rows = joined[first_row : first_row + len(rest_nHD)]
        rows.copy_(rows + rest_nHD)
    return joined


def _join_on_gpu(
    joined: Tensor, first: Tensor, second: Tensor, rest: Tensor | None, first_row: int
) -> None:
    num_rows, num_heads, dim = joined.shape
    width = num_heads * dim
    if not num_rows:
        return
    end_row = first_row if rest is None else first_row + len(rest)
    added = first if rest is None else rest
    for x in (first, second, added):
        assert x.stride(2) == 1, "elements of a head have gaps"
        assert x.shape[1] == 1 or x.stride(1) == dim, "heads have gaps"
    with torch.cuda.device_of(first):
        join_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            joined, first, second, added, first_row, end_row, first.shape[1] * dim, width,
            first.stride(0), second.stride(0), added.stride(0),
            BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        )  # fmt: skip


@triton.jit
def join_kernel(
    joined, first, second, added, first_row, end_row, split, width,
    first_stride, second_stride, added_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a part of one row; see `join_heads`."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    is_first = col < split
    x = tl.load(first + row * first_stride + col, mask=is_first, other=0.0)
    y = tl.load(
        second + row * second_stride + (col - split), mask=inside & (col >= split), other=0.0
    )
    total = tl.where(is_first, x, y).to(tl.float32)
    if (row >= first_row) & (row < end_row):
        at = added + (row - first_row) * added_stride + col
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(joined + row * width + col, total.to(joined.dtype.element_ty), mask=inside)
