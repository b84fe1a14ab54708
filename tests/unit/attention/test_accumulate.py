"""Sums of parts: softmax parts merge exactly, gradients round once, halves of heads join in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_attn.attention.accumulate import Rows, RowSum, SoftmaxSum, every_row
from dist_attn_kernels import join, merge

L, H, D = 37, 3, 8
RUN = Rows(np.array([[5, 30]]))
SCATTERED = Rows(np.array([[0, 4], [9, 22], [30, 37]]))


def part(rows: Rows, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and normaliser of random keys; some queries see none."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(rows.num_rows, H, D, generator=generator, dtype=torch.float64)
    lse = 300 * torch.randn(H, rows.num_rows, generator=generator, dtype=torch.float64)
    lse[:, ::7] = float("-inf")
    return out.masked_fill(torch.isneginf(lse.t())[..., None], 0).to(dtype), lse


def merged(parts: list[tuple[Rows, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The definition, in float64: weights exp(lse) over their sum."""
    lses = torch.full((len(parts), H, L), float("-inf"), dtype=torch.float64)
    outs = torch.zeros(len(parts), L, H, D, dtype=torch.float64)
    for i, (rows, out, lse) in enumerate(parts):
        lses[i][:, rows.select(out.device)] = lse
        outs[i][rows.select(out.device)] = out.double()
    total = lses.logsumexp(0)
    weights = (lses - total.masked_fill(torch.isneginf(total), 0)).exp()
    return (weights.transpose(1, 2)[..., None] * outs).sum(0), total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "order", [[every_row(L)], [every_row(L), RUN], [RUN, SCATTERED, every_row(L)], [SCATTERED], []]
)
def test_parts_of_a_softmax(order: list[Rows], dtype: torch.dtype) -> None:
    parts = [(rows, *part(rows, i, dtype)) for i, rows in enumerate(order)]
    want, want_lse = merged(parts) if parts else (torch.zeros(L, H, D), torch.full((H, L), -np.inf))
    total = SoftmaxSum(torch.empty(L, H, D, dtype=dtype), D)
    for rows, out, lse in parts:
        total.add(rows, out.clone(), lse.clone())
    out, lse = total.result()
    assert out.dtype == dtype
    torch.testing.assert_close(lse.double(), want_lse.double(), rtol=1e-6, atol=1e-5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(out.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [every_row(L), RUN, SCATTERED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gpu_kernel_merges_alike(rows: Rows, dtype: torch.dtype) -> None:
    total, total_lse = part(every_row(L), 0, dtype)
    more, more_lse = part(rows, 1, dtype)
    total_lse, more_lse = total_lse.float(), more_lse.float()
    want, want_lse = total.clone(), total_lse.clone()
    select = rows.select(total.device)
    merge.merge_part(want, want_lse, more, more_lse, select)
    merge._merge_on_gpu(total, total_lse, more, more_lse, select)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(total, want, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(total_lse, want_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [None, every_row(L), RUN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gpu_kernel_joins_alike(
    rows: Rows | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "_BLOCK", 16)  # a row of 24 elements takes two programs
    whole = part(every_row(L), 0, dtype)[0]
    first, second = whole[:, :1].contiguous(), whole[:, 1:]
    rest, start = None, 0
    if rows is not None and rows.run is not None:
        rest, start = part(rows, 1, torch.float32)[0], rows.run.start
    got = torch.full_like(whole, torch.nan)
    join._join_on_gpu(got, first, second, rest, start)
    assert torch.equal(join.join_heads(first, second, rest, start), got)
    want = whole.double()
    if rest is not None:
        want[start : start + len(rest)] += rest.double()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=0)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    "order", [[], [RUN], [SCATTERED], [every_row(L)], [every_row(L), RUN], [RUN, SCATTERED, RUN]]
)
def test_gradients_add_up_and_round_once(order: list[Rows], halves: bool) -> None:
    dtype = torch.bfloat16
    total = RowSum(torch.empty(L, H, D, dtype=dtype))
    exact = torch.zeros(L, H, D, dtype=torch.float64)
    values = [part(rows, i, dtype)[0] for i, rows in enumerate(order)]
    own = part(every_row(L), 99, dtype)[0]
    if halves:
        total.add_heads(slice(0, 1), own[:, :1].contiguous())
        exact += own.double()
    for rows, value in zip(order, values, strict=True):
        total.add(rows, value.clone())
        exact[rows.select(exact.device)] += value.double()
    if halves:
        total.add_heads(slice(1, H), own[:, 1:].contiguous())
    got = total.result()
    if len(order) + halves <= 2:
        assert torch.equal(got, exact.to(dtype))
    # Sums of more are kept in float32, whose own rounding may tip the last one.
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)
    doubled = torch.zeros_like(exact).to(dtype)
    for rows, value in zip(order, values, strict=True):
        doubled[rows.select(exact.device)] += value  # the control rounds each time
    if len(order) > 2 and not halves:
        assert not torch.equal(doubled, got)
