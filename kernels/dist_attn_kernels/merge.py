"""Merging two parts of a softmax over different keys, by their normalisers.

On a GPU one kernel reads both parts and writes the result; elsewhere torch operations do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32


def merge_part(
    total_LHD: Tensor,
    total_lse_HL: Tensor,
    part_nHD: Tensor,
    part_lse_Hn: Tensor,
    rows: slice | Tensor,
) -> None:
    """Merge a part into some rows of a total, in place.

    Args:
        total_LHD: outputs so far, [L, H, D], contiguous inside a row.
        total_lse_HL: their normalisers [H, L], natural logarithm, float32 or float64.
        part_nHD: outputs of the part, any floating-point type.
        part_lse_Hn: their normalisers [H, n].
        rows: which rows of the total the part's are, as a slice or as int64 [n].

    Numerics:
        Weights are exp(lse - the larger lse) in the type of `total_lse_HL`, so nothing overflows.
        The sum is rounded once, to the total's type. Rows without keys on either side stay 0 with
        normaliser -inf.
    """
    if not len(part_nHD):
        return
    if total_LHD.is_cuda and total_lse_HL.dtype == torch.float32:
        _merge_on_gpu(total_LHD, total_lse_HL, part_nHD, part_lse_Hn, rows)
        return
    before, lse = total_lse_HL[:, rows], part_lse_Hn.to(total_lse_HL.dtype)
    top = torch.maximum(before, lse)
    top = top.masked_fill(torch.isneginf(top), 0)
    keep, gain = torch.exp(before - top), torch.exp(lse - top)
    weight = keep + gain
    total_lse_HL[:, rows] = top + torch.log(weight)
    # The two weights add up to one whatever the size of the normalisers. Where neither side has
    # keys both are 0.
    weight = weight.masked_fill(weight == 0, 1)
    keep, gain = ((w / weight).t()[..., None] for w in (keep, gain))
    wide = total_lse_HL.dtype
    merged = torch.addcmul(total_LHD[rows].to(wide) * keep, part_nHD.to(wide), gain)
    total_LHD[rows] = merged.to(total_LHD.dtype)


def _merge_on_gpu(
    total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice | Tensor
) -> None:
    num_rows, num_heads, dim = part.shape
    if part.stride(2) != 1 or part.stride(1) != dim:
        part = part.contiguous()
    assert total.stride(2) == 1, "outputs are contiguous inside a row"
    assert total.stride(1) == dim, "outputs are contiguous inside a row"
    part_lse = part_lse.float()
    start, index = (0, rows) if isinstance(rows, Tensor) else (rows.start or 0, total_lse)
    with torch.cuda.device_of(total):
        merge_kernel[(triton.cdiv(num_rows, _ROWS), num_heads)](
            total, total_lse, part, part_lse,
            index, start, num_rows, total.stride(0), part.stride(0),
            total_lse.stride(0), total_lse.stride(1), part_lse.stride(0), part_lse.stride(1),
            D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=_ROWS, INDEXED=index is rows,
        )  # fmt: skip


@triton.jit
def merge_kernel(
    total, total_lse, part, part_lse, index, start, num_rows,
    total_stride, part_stride, total_lse_head, total_lse_row, part_lse_head, part_lse_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Merge ROWS rows of one head; see `merge_part`."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    valid = n < num_rows
    row = tl.load(index + n, mask=valid, other=0) if INDEXED else n + start
    lse_at = total_lse + head * total_lse_head + row * total_lse_row
    a = tl.load(lse_at, mask=valid, other=float("-inf"))
    b = tl.load(part_lse + head * part_lse_head + n * part_lse_row, mask=valid, other=float("-inf"))
    top = tl.maximum(a, b)
    top = tl.where(top == float("-inf"), 0.0, top)
    keep = tl.exp(a - top)
    gain = tl.exp(b - top)
    weight = keep + gain
    merged_lse = top + tl.log(weight)
    weight = tl.where(weight == 0.0, 1.0, weight)
    d = tl.arange(0, BLOCK_D)
    inside = valid[:, None] & (d < D)[None, :]
    at = total + row[:, None] * total_stride + head * D + d[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(part + n[:, None] * part_stride + head * D + d[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    merged = x * (keep / weight)[:, None] + y * (gain / weight)[:, None]
    # Every warp loads the normalisers for itself: none may be overwritten before all have.
    tl.debug_barrier()
    tl.store(lse_at, merged_lse, mask=valid)
    tl.store(at, merged.to(total.dtype.element_ty), mask=inside)
