"""Parts of a parameter as rectangles, so that fragments cut in different ways can be matched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """Rows [first_row, last_row) and columns [first_col, last_col) of a parameter seen as a matrix.

    In the 1-d tensor that holds the region its first element is at `offset`, and its rows follow
    each other at `stride`.
    """

    first_row: int
    last_row: int
    first_col: int
    last_col: int
    offset: int
    stride: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.last_row - self.first_row, self.last_col - self.first_col

    @property
    def numel(self) -> int:
        """Elements."""
        rows, cols = self.size
        return rows * cols

    @property
    def span(self) -> int:
        """Elements of the tensor from the region's first to its last."""
        rows, cols = self.size
        return (rows - 1) * self.stride + cols


def regions(shape: Sequence[int], start: int, numel: int, run: int | None) -> list[Region]:
    """The rectangles of a fragment; see `Fragment`.

    Args:
        shape: the parameter's; its first dimension makes rows and the others columns, a vector is
            one row.
        start: the fragment's first element in the flattened parameter.
        numel: its elements.
        run: elements of each row, or None for a contiguous fragment.
    """
    width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    row, col = divmod(start, width)
    if run is not None:
        assert numel % run == 0
        assert col + run <= width
        return [Region(row, row + numel // run, col, col + run, 0, run)]
    found = []
    done = 0
    while done < numel:
        left = numel - done
        if col or left < width:
            taken = min(width - col, left)
            found.append(Region(row, row + 1, col, col + taken, done, width))
            row, col = row + 1, 0
        else:
            rows = left // width
            taken = rows * width
            found.append(Region(row, row + rows, 0, width, done, width))
            row += rows
        done += taken
    return found


def overlap(a: Region, b: Region) -> tuple[Region, Region] | None:
    """The part that two regions share, as each of their tensors holds it; None if there is none."""
    first_row, last_row = max(a.first_row, b.first_row), min(a.last_row, b.last_row)
    first_col, last_col = max(a.first_col, b.first_col), min(a.last_col, b.last_col)
    if first_row >= last_row or first_col >= last_col:
        return None

    def inside(r: Region) -> Region:
        offset = r.offset + (first_row - r.first_row) * r.stride + first_col - r.first_col
        return Region(first_row, last_row, first_col, last_col, offset, r.stride)

    return inside(a), inside(b)
