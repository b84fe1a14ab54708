"""Adding up parts: softmax parts by their normaliser, gradient parts by rows, both in float32.

The part that came last is kept apart until the next one or the end: the last addition then rounds
straight to the result, and a sum of two parts never exists in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dist_attn.layout import IntArray
from dist_attn_kernels.join import join_heads
from dist_attn_kernels.merge import merge_part


@functools.lru_cache(maxsize=256)
def index_of(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as an int64 tensor, made once: heads are picked in every layer."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for 16-bit and float32 inputs, float64 for float64 ones."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of a tensor's rows, ascending: as a slice where they are in sequence, else by index."""

    intervals: IntArray
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def run(self) -> slice | None:
        """The rows as a slice, if they are in sequence."""
        if len(self.intervals) == 0:
            return slice(0, 0)
        if (self.intervals[1:, 0] != self.intervals[:-1, 1]).any():
            return None
        return slice(int(self.intervals[0, 0]), int(self.intervals[-1, 1]))

    @functools.cached_property
    def num_rows(self) -> int:
        """Number of rows."""
        return int((self.intervals[:, 1] - self.intervals[:, 0]).sum())

    def index(self, device: torch.device) -> Tensor:
        """Row numbers as int64 on `device`, made once."""
        if device not in self._on_device:
            sizes = self.intervals[:, 1] - self.intervals[:, 0]
            shift = self.intervals[:, 0] - (np.cumsum(sizes) - sizes)
            rows = np.arange(self.num_rows) + np.repeat(shift, sizes)
            self._on_device[device] = torch.from_numpy(rows).to(device)
        return self._on_device[device]

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """Select the rows, as a view where they are in sequence."""
        if self.run is not None:
            return x.narrow(dim, self.run.start, self.run.stop - self.run.start)
        return x.index_select(dim, self.index(x.device))

    def put(self, target: Tensor, values: Tensor, dim: int = 0) -> None:
        """Overwrite the rows of `target`."""
        if self.run is not None:
            target.narrow(dim, self.run.start, self.run.stop - self.run.start).copy_(values)
        else:
            target.index_copy_(dim, self.index(target.device), values.to(target.dtype))

    def add(self, target: Tensor, values: Tensor) -> None:
        """Add to the rows of `target`, rounding each sum once."""
        if self.run is not None:
            target[self.run].add_(values)
        else:
            self.put(target, self.take(target) + values)

    def select(self, device: torch.device) -> slice | Tensor:
        """The rows as what indexes a tensor on `device`."""
        return self.index(device) if self.run is None else self.run

    def covers(self, num_rows: int) -> bool:
        """Whether these are all of `num_rows` rows."""
        return self.run is not None and self.run == slice(0, num_rows)


def every_row(num_rows: int) -> Rows:
    """Return all of `num_rows` rows."""
    return Rows(np.array([[0, num_rows]], dtype=np.int64))


class SoftmaxSum:
    """The output of a softmax whose keys come in parts.

    Numerics:
        Parts are weighted by exp(lse_part - the larger lse), so nothing overflows; a query that has
        seen no keys has output 0 and normaliser -inf. Sums are kept in float32 and rounded once at
        the end: the error does not grow with the number of parts.
    """

    def __init__(self, q_LHD: Tensor, out_dim: int) -> None:
        self._like = q_LHD
        self._shape = (*q_LHD.shape[:2], out_dim)
        self._dtype = accumulation_dtype(q_LHD.dtype)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._last: tuple[Rows, Tensor, Tensor] | None = None

    def add(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Add a part, out [n, H, D] and lse [H, n] of some of the queries; it is the sum's now."""
        if self._out is None and self._last is None and rows.covers(self._shape[0]):
            self._out, self._lse = out, lse.to(self._dtype)
            return
        self._merge_last(self._dtype)
        self._last = (rows, out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return out in the dtype of the queries and lse [H, L] in the accumulation dtype."""
        self._merge_last(self._like.dtype if self._out is None else self._out.dtype)
        out, lse = self._tensors(self._like.dtype if self._out is None else self._out.dtype)
        return out.to(self._like.dtype).contiguous(), lse

    def _merge_last(self, dtype: torch.dtype) -> None:
        """Merge the part that is kept apart into a total of some dtype."""
        if self._last is None:
            return
        rows, out, lse = self._last
        self._last = None
        merge_part(*self._tensors(dtype), out, lse, rows.select(out.device))

    def _tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            self._out = self._like.new_zeros(self._shape, dtype=dtype)
            num_rows, num_heads, _ = self._shape
            no_keys = float("-inf")
            self._lse = self._like.new_full((num_heads, num_rows), no_keys, dtype=self._dtype)
        self._out, self._lse = self._out.to(dtype).contiguous(), self._lse.contiguous()
        return self._out, self._lse


class RowSum:
    """A gradient whose parts touch some of its rows, or all rows of some of its heads."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._dtype = accumulation_dtype(like.dtype)
        self._total: Tensor | None = None
        self._last: tuple[Rows, Tensor] | None = None
        self._by_heads: list[tuple[slice, Tensor]] = []

    def add(self, rows: Rows, part: Tensor) -> None:
        """Add a part to the given rows; it is the sum's now."""
        if self._total is None and self._last is None and rows.covers(len(self._like)):
            self._total = part
            return
        self._add_last()
        self._last = (rows, part)

    def add_all(self, part: Tensor) -> None:
        """Add a part that has every row; it is the sum's now."""
        self.add(self._every_row(), part)

    def add_heads(self, heads: slice, part: Tensor) -> None:
        """Add every row of one half of the heads; the other half comes too.

        Such parts are added to everything else at the end.
        """
        self._by_heads.append((heads, part))

    def add_at(self, index: tuple[Tensor, ...], part: Tensor) -> None:
        """Add to the elements of an index, none of which it names twice."""
        self.accumulator()[index] += part.to(self._dtype)

    def parts(self) -> list[tuple[Rows, Tensor]]:
        """Return what the sum is made of so far, two parts at the most, without those by heads."""
        total = [] if self._total is None else [(self._every_row(), self._total)]
        return total if self._last is None else [*total, self._last]

    def wide(self) -> Tensor:
        """Return the sum in the accumulation dtype."""
        assert not self._by_heads, "parts by heads are added at the end"
        return self.accumulator()

    def accumulator(self) -> Tensor:
        """Return a tensor of the accumulation dtype; what is added to it is added to the sum."""
        self._add_last()
        return self._wide()

    def result(self) -> Tensor:
        """Return the sum in the dtype of the tensor whose gradient it is."""
        if self._by_heads:
            return self._with_heads()
        dtype = self._like.dtype
        if self._last is None:
            return self._wide().to(dtype) if self._total is None else self._total.to(dtype)
        rows, part = self._last
        if self._total is None:
            total = torch.zeros_like(self._like, memory_format=torch.contiguous_format)
            rows.put(total, part)
            return total
        # The sum of two numbers is rounded once, whatever they are kept in.
        if self._total.dtype == dtype:
            rows.add(self._total, part)
            return self._total
        if rows.covers(len(self._like)):
            return torch.add(self._total, part, out=self._total.new_empty(0, dtype=dtype))
        return self.wide().to(dtype)

    def _with_heads(self) -> Tensor:
        """Join the two halves of the heads, and add what there is beside them."""
        (_, first), (_, second) = sorted(self._by_heads, key=lambda part: part[0].start)
        rows, rest = self._every_row(), self._total
        if rest is None and self._last is not None:
            rows, rest = self._last
        elif self._last is not None:
            self._add_last()
            rest = self._total
        if rest is None or rows.run is not None:
            joined = join_heads(first, second, rest, 0 if rows.run is None else rows.run.start)
        else:
            joined = join_heads(first, second, None, 0)
            rows.add(joined, rest)
        return joined.to(self._like.dtype)

    def _every_row(self) -> Rows:
        return every_row(len(self._like))

    def _add_last(self) -> None:
        if self._last is not None:
            rows, part = self._last
            self._last = None
            rows.add(self._wide(), part)

    def _wide(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self._like.shape, dtype=self._dtype, device=self._like.device)
        self._total = self._total.to(self._dtype)
        return self._total
