"""Adding up parts: softmax parts by their normaliser, gradient parts by rows, both in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dist_attn.layout import IntArray


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

    def covers(self, num_rows: int) -> bool:
        """Whether these are all of `num_rows` rows."""
        return self.run is not None and self.run == slice(0, num_rows)


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

    def add(self, rows: Rows, out: Tensor, lse: Tensor) -> None:
        """Add a part: out [n, H, D] and lse [H, n] of some of the queries."""
        if self._out is None and rows.covers(self._shape[0]):
            self._out, self._lse = out, lse.to(self._dtype)
            return
        total, total_lse = self._tensors()
        before, lse = rows.take(total_lse, 1), lse.to(self._dtype)
        top = torch.maximum(before, lse)
        top = top.masked_fill(torch.isneginf(top), 0)
        keep, gain = torch.exp(before - top), torch.exp(lse - top)
        weight = keep + gain
        rows.put(total_lse, top + torch.log(weight), 1)
        # The two weights add up to one whatever the size of the normalisers. Where neither side has
        # keys both are 0.
        weight = weight.masked_fill(weight == 0, 1)
        keep, gain = ((w / weight).t()[..., None] for w in (keep, gain))
        rows.put(total, torch.addcmul(rows.take(total) * keep, out.to(self._dtype), gain))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return out in the dtype of the queries and lse [H, L] in the accumulation dtype."""
        if self._out is None:
            self._tensors()
        assert self._out is not None
        assert self._lse is not None
        return self._out.to(self._like.dtype).contiguous(), self._lse

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            self._out = self._like.new_zeros(self._shape, dtype=self._dtype)
            num_rows, num_heads, _ = self._shape
            no_keys = float("-inf")
            self._lse = self._like.new_full((num_heads, num_rows), no_keys, dtype=self._dtype)
        elif self._out.dtype != self._dtype or not self._lse.is_contiguous():
            self._out, self._lse = self._out.to(self._dtype), self._lse.contiguous()
        return self._out, self._lse


class RowSum:
    """A gradient whose parts touch some of its rows."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._dtype = accumulation_dtype(like.dtype)
        self._total: Tensor | None = None

    def add(self, rows: Rows, part: Tensor) -> None:
        """Add a part to the given rows."""
        if self._total is None and rows.covers(self._like.shape[0]):
            self._total = part
            return
        total = self._wide()
        if rows.run is not None:
            rows.take(total).add_(part)
        else:
            rows.put(total, rows.take(total) + part)

    def add_all(self, part: Tensor) -> None:
        """Add a part that has every row."""
        self._total = part.to(self._dtype) if self._total is None else self._wide().add_(part)

    def wide(self) -> Tensor:
        """Return the sum in the accumulation dtype."""
        return self._wide()

    def result(self) -> Tensor:
        """Return the sum in the dtype of the tensor whose gradient it is."""
        total = self._wide() if self._total is None else self._total
        return total.to(self._like.dtype)

    def _wide(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self._like.shape, dtype=self._dtype, device=self._like.device)
        elif self._total.dtype != self._dtype:
            self._total = self._total.to(self._dtype)
        return self._total
