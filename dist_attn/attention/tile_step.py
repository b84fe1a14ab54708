"""A step under any mask: only the tiles that the mask touches are computed.

On a GPU the block-sparse kernels run; elsewhere, and for float64 and odd head dimensions, plain
torch operations do, a row of tiles at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from dist_attn_kernels import reference
from dist_attn_kernels.segments import Saved
from torch import Tensor

from dist_attn.attention.accumulate import Rows, SoftmaxSum, accumulation_dtype
from dist_attn.attention.block_lists import BlockSparse
from dist_attn.attention.step import Gradients, Kernel
from dist_attn.layout import IntArray
from dist_attn.masks import Mask, TileLists, stretches, tile_lists

#: Tokens of a tile's side in the torch path.
TILE = 128
_GPU_HEAD_DIMS = range(16, 257, 8)
_GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class _RowOfTiles:
    """Some queries, the keys that their tiles hold, and which of these count (None: all)."""

    q: slice
    k: Rows
    allowed: Tensor | None


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
            sparse = self._on_device(q, k)
            if sparse.lists is not None:
                total.add(everything, *sparse.forward(kernel.softmax_scale, q, k, v))
            return
        out = torch.zeros_like(q)
        lse_dtype = accumulation_dtype(q.dtype)
        lse = q.new_full((q.shape[1], len(q)), float("-inf"), dtype=lse_dtype)
        for heads, kv_heads, first in self._head_groups(k):
            for row in self._rows(first, q.device):
                part = reference.attention_forward(
                    q[row.q, heads],
                    row.k.take(k)[:, kv_heads],
                    row.k.take(v)[:, kv_heads],
                    row.allowed,
                    kernel.softmax_scale,
                )
                out[row.q, heads], lse[heads, row.q] = part
        total.add(everything, out, lse)

    def backward(self, kernel: Kernel, saved: Saved, total: Gradients) -> None:
        """Add this step's part of the gradients; `saved` has out and lse over all steps."""
        q, k, v = saved.q, saved.k, saved.v
        if not len(q) or not len(k):
            return
        if _on_gpu(q):
            sparse = self._on_device(q, k)
            if sparse.lists is not None:
                dq, dk, dv = sparse.backward(kernel.softmax_scale, saved)
                total.dq.add_all(dq)
                total.dk.add_all(dk)
                total.dv.add_all(dv)
            return
        dq, dk, dv = total.dq.wide(), total.dk.wide(), total.dv.wide()
        for heads, kv_heads, first in self._head_groups(k):
            for row in self._rows(first, q.device):
                parts = reference.attention_backward(
                    saved.dout[row.q, heads],
                    q[row.q, heads],
                    row.k.take(k)[:, kv_heads],
                    row.k.take(v)[:, kv_heads],
                    saved.out[row.q, heads],
                    saved.lse[heads, row.q],
                    row.allowed,
                    kernel.softmax_scale,
                )
                dq[row.q, heads] += parts[0]
                index = row.k.index(k.device)
                for grad, part in ((dk, parts[1]), (dv, parts[2])):
                    grad[index[:, None], kv_heads] += part

    def _head_groups(self, k: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Query heads of one pattern that share a key/value head, and one of them for the mask."""
        repeats = len(self._heads) // k.shape[1]
        groups: dict[tuple[Hashable, int], list[int]] = {}
        for i, head in enumerate(self._heads):
            groups.setdefault((self._mask.pattern(head), i // repeats), []).append(i)
        for (_, kv_head), members in groups.items():
            yield torch.tensor(members), torch.tensor([kv_head]), self._heads[members[0]]

    def _rows(self, head: int, device: torch.device) -> Iterator[_RowOfTiles]:
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

    def _on_device(self, q: Tensor, k: Tensor) -> BlockSparse:
        key = (q.device, k.shape[1])
        if key not in self._block_sparse:
            positions = (self._q_positions, self._k_positions)
            self._block_sparse[key] = BlockSparse(
                self._mask, positions, self._heads, k.shape[1], q.device
            )
        return self._block_sparse[key]


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in _GPU_DTYPES and q.shape[2] in _GPU_HEAD_DIMS
