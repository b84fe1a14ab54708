"""A step under any mask: only the tiles that the mask touches are computed.

On a GPU the block-sparse kernels run; elsewhere, and for float64 and odd head dimensions, plain
torch operations do, a row of tiles at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_attn.attention.accumulate import Rows, SoftmaxSum, accumulation_dtype
from dist_attn.attention.block_lists import BlockSparse
from dist_attn.attention.step import Gradients, Kernel
from dist_attn.layout import IntArray
from dist_attn.masks import Mask, TileLists, stretches, tile_lists
from dist_attn_kernels import reference
from dist_attn_kernels.lists import BlockLists
from dist_attn_kernels.segments import Saved

#: Tokens of a tile's side in the torch path.
TILE = 128
#: Scores of a pattern up to which its rows are kept, a byte each.
MAX_KEPT_SCORES = 1 << 25
_GPU_HEAD_DIMS = range(16, 257, 8)
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class _RowOfTiles:
    """Some queries, the keys that their tiles hold, and which of these count (None: all)."""

    q: slice
    k: Rows
    allowed: Tensor | None


@dataclass(frozen=True)
class _Heads:
    """Query heads of one pattern, and the key/value heads that they read in equal groups."""

    q: Tensor | slice
    kv: slice


class TileStep:
    """The local queries against the keys of one rank, tile by tile.

    Args:
        mask: the mask.
        q_positions: ascending stream positions of the queries.
        k_positions: ascending stream positions of the keys.
        heads: the mask's number of each query head.
    """

    def __init__(
        self, mask: Mask, q_positions: IntArray, k_positions: IntArray, heads: tuple[int, ...]
    ) -> None:
        self._mask = mask
        self._heads = heads
        self._q_positions = q_positions
        self._k_positions = k_positions
        self._lists: dict[Hashable, TileLists] = {}
        self._kept_rows: dict[tuple[Hashable, torch.device], list[_RowOfTiles]] = {}
        self._block_sparse: dict[Hashable, BlockSparse] = {}

    def forward(
        self,
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        total: SoftmaxSum,
    ) -> None:
        """Add this step's part of the output."""
        if not len(q) or not len(k):
            return
        everything = Rows(np.array([[0, len(q)]]))
        if _on_gpu(q):
            sparse = self._on_device(q.device, k.shape[1])
            if sparse.lists is not None:
                total.add(everything, *sparse.forward(kernel.softmax_scale, q, k, v))
            return
        out = torch.zeros_like(q)
        lse_dtype = accumulation_dtype(q.dtype)
        lse = q.new_full((q.shape[1], len(q)), float("-inf"), dtype=lse_dtype)
        for heads, row in self._work(k):
            part = reference.attention_forward(
                q[row.q, heads.q],
                row.k.take(k)[:, heads.kv],
                row.k.take(v)[:, heads.kv],
                row.allowed,
                kernel.softmax_scale,
            )
            out[row.q, heads.q], lse[heads.q, row.q] = part
        total.add(everything, out, lse)

    def backward(self, kernel: Kernel, saved: Saved, total: Gradients) -> None:
        """Add this step's part of the gradients; `saved` has out and lse over all steps."""
        q, k, v = saved.q, saved.k, saved.v
        if not len(q) or not len(k):
            return
        if _on_gpu(q):
            sparse = self._on_device(q.device, k.shape[1])
            if sparse.lists is not None:
                dq, dk, dv = sparse.backward(kernel.softmax_scale, saved)
                total.dq.add_all(dq)
                total.dk.add_all(dk)
                total.dv.add_all(dv)
            return
        dq, dk, dv = (x.accumulator() for x in (total.dq, total.dk, total.dv))
        for heads, row in self._work(k):
            parts = reference.attention_backward(
                saved.dout[row.q, heads.q],
                q[row.q, heads.q],
                row.k.take(k)[:, heads.kv],
                row.k.take(v)[:, heads.kv],
                saved.out[row.q, heads.q],
                saved.lse[heads.q, row.q],
                row.allowed,
                kernel.softmax_scale,
            )
            dq[row.q, heads.q] += parts[0]
            for grad, part in ((dk, parts[1]), (dv, parts[2])):
                some = row.k.take(grad)
                some[:, heads.kv] += part
                if row.k.run is None:  # then it was a copy
                    row.k.put(grad, some)

    def _work(self, k: Tensor) -> Iterator[tuple[_Heads, _RowOfTiles]]:
        """Heads that are computed together, with each row of tiles of their pattern."""
        repeats = len(self._heads) // k.shape[1]
        patterns: dict[Hashable, list[int]] = {}
        for i, head in enumerate(self._heads):
            patterns.setdefault(self._mask.pattern(head), []).append(i)
        for members in patterns.values():
            groups = [_Heads(slice(None), slice(None))]
            if len(patterns) > 1:
                readers: dict[int, list[int]] = {}
                for i in members:
                    readers.setdefault(i // repeats, []).append(i)
                groups = [_Heads(torch.tensor(q), slice(kv, kv + 1)) for kv, q in readers.items()]
            for row in self._rows(self._heads[members[0]], k.device):
                for heads in groups:
                    yield heads, row

    def _rows(self, head: int, device: torch.device) -> Iterable[_RowOfTiles]:
        """Return a pattern's rows, kept for the next layer if they are not too large."""
        key = (self._mask.pattern(head), device)
        if key in self._kept_rows:
            return self._kept_rows[key]
        full, partial = self._tile_lists(head).counts()
        if (full + partial) * TILE * TILE > MAX_KEPT_SCORES:
            return self._make_rows(head, device)
        self._kept_rows[key] = list(self._make_rows(head, device))
        return self._kept_rows[key]

    def _make_rows(self, head: int, device: torch.device) -> Iterator[_RowOfTiles]:
        row, key, full = self._tile_lists(head).expand()
        bounds = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
        for a, b in itertools.pairwise(bounds.tolist()):
            start = int(row[a]) * TILE
            q = slice(start, min(start + TILE, len(self._q_positions)))
            ends = np.minimum(key[a:b] * TILE + TILE, len(self._k_positions))
            k = Rows(np.stack([key[a:b] * TILE, ends], axis=1))
            allowed = None
            if not full[a:b].all():
                k_positions = self._k_positions[k.index(torch.device("cpu")).numpy()]
                q_positions = self._q_positions[q]
                seen = self._mask.allows(q_positions[:, None], k_positions[None], head)
                shape = (len(q_positions), len(k_positions))
                allowed = torch.from_numpy(np.broadcast_to(seen, shape).copy()).to(device)
            yield _RowOfTiles(q, k, allowed)

    def _tile_lists(self, head: int) -> TileLists:
        pattern = self._mask.pattern(head)
        if pattern not in self._lists:
            q, k = stretches(self._q_positions, TILE), stretches(self._k_positions, TILE)
            self._lists[pattern] = tile_lists(self._mask, q, k, head)
        return self._lists[pattern]

    def prepare(self, device: torch.device, num_kv_heads: int) -> BlockLists | None:
        """Make and return the block-sparse kernels' lists, as the first call would do."""
        if not len(self._q_positions) or not len(self._k_positions):
            return None
        return self._on_device(device, num_kv_heads).lists

    def _on_device(self, device: torch.device, num_kv_heads: int) -> BlockSparse:
        key = (device, num_kv_heads)
        if key not in self._block_sparse:
            positions = (self._q_positions, self._k_positions)
            self._block_sparse[key] = BlockSparse(
                self._mask, positions, self._heads, num_kv_heads, device
            )
        return self._block_sparse[key]


def why_not_block_sparse(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why the block-sparse kernels cannot take such tensors, or None if they can."""
    if device.type != "cuda":
        return f"run on cuda, not on {device.type}"
    if dtype not in _GPU_DTYPES:
        return f"take float16, bfloat16 and float32, not {dtype}"
    if head_dim not in _GPU_HEAD_DIMS:
        return f"take head dimensions 16 to 256 in eights, not {head_dim}"
    return None


def _on_gpu(q: Tensor) -> bool:
    return why_not_block_sparse(q.device, q.dtype, q.shape[2]) is None
