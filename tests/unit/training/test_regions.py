"""Fragments cut in different ways meet in rectangles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_attn.training.regions import Region, overlap, regions


def cells(region: Region, width: int) -> dict[int, int]:
    """Flat index in the parameter -> index in the fragment's tensor."""
    return {
        row * width + col: region.offset
        + (row - region.first_row) * region.stride
        + col
        - region.first_col
        for row in range(region.first_row, region.last_row)
        for col in range(region.first_col, region.last_col)
    }


def all_cells(found: list[Region], width: int) -> dict[int, int]:
    result: dict[int, int] = {}
    for region in found:
        part = cells(region, width)
        assert not result.keys() & part.keys()
        result |= part
    return result


@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_contiguous_fragments(rows: int, width: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * width - 1))
    numel = data.draw(st.integers(1, rows * width - start))
    found = regions((rows, width), start, numel, None)
    assert len(found) <= 3
    assert all_cells(found, width) == {start + i: i for i in range(numel)}


@given(st.data())
def test_overlaps_of_rows_and_columns(data: st.DataObject) -> None:
    rows, width = 5, 7
    start = data.draw(st.integers(0, rows * width - 1))
    numel = data.draw(st.integers(1, rows * width - start))
    first, run = data.draw(st.tuples(st.integers(0, 6), st.integers(1, 7)))
    run = min(run, width - first)
    contiguous = regions((rows, width), start, numel, None)
    (columns,) = regions((rows, width), width + first, 3 * run, run)
    source = cells(columns, width)
    shared = {}
    for region in contiguous:
        pair = overlap(region, columns)
        if pair is None:
            continue
        a, b = (cells(r, width) for r in pair)
        assert a.keys() == b.keys()
        assert pair[0].numel == len(a)
        shared |= b
    expected = source.keys() & set(range(start, start + numel))
    assert shared == {k: source[k] for k in expected}


def test_vectors_are_one_row() -> None:
    assert regions((9,), 2, 4, None) == [Region(0, 1, 2, 6, 0, 9)]
    assert regions((), 0, 1, None) == [Region(0, 1, 0, 1, 0, 1)]


def test_strided_views_reach_the_right_elements() -> None:
    whole = torch.arange(35.0).view(5, 7)
    (columns,) = regions((5, 7), 7 + 2, 9, 3)
    held = whole[1:4, 2:5].reshape(-1)
    view = held.as_strided(columns.size, (columns.stride, 1))
    assert torch.equal(view, whole[1:4, 2:5])


def test_runs_that_leave_their_row_are_no_fragment() -> None:
    with pytest.raises(AssertionError):
        regions((5, 7), 5, 9, 3)
