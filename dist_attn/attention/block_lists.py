"""From a mask and the tokens of two ranks to the lists that the block-sparse kernels walk."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_attn.layout import IntArray
from dist_attn.masks import Mask, stretches, tile_lists
from dist_attn.masks.parts import stack_parts, union_per_row
from dist_attn_kernels.lists import BITS, BLOCK, FULL, INTERVAL, BlockLists, Tiles, build_lists
from dist_attn_kernels.segments import Saved

#: Partial tiles whose elements are evaluated at a time.
TILES_AT_A_TIME = 4096
Coordinates = tuple[IntArray, IntArray, IntArray]


class BlockSparse:
    """The lists of some query heads on one device, and the kernels on them.

    A partial tile is cut by one or two key intervals per query where the mask is made of such, else
    by bits; tiles of equal bits share them.

    Args:
        mask: the mask.
        positions: stream positions of the queries and of the keys.
        heads: query heads of the mask.
        num_kv_heads: key/value heads that these read.
        device: where the lists go.
    """

    def __init__(
        self,
        mask: Mask,
        positions: tuple[IntArray, IntArray],
        heads: Sequence[int],
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        self.lists: BlockLists | None = None
        tables = list_tiles(mask, positions, heads)
        if tables is None:
            return
        head, q_block, k_block, kind = (torch.from_numpy(x).to(device) for x in tables.tiles)
        intervals, bits = (
            None if x is None else torch.from_numpy(x).to(device)
            for x in (tables.intervals, tables.bits)
        )
        lengths = len(positions[0]), len(positions[1])
        num_heads = len(heads) if tables.per_head else 1
        tiles = Tiles(*lengths, num_heads, head, q_block, k_block, kind, intervals, bits)
        self.lists = build_lists(tiles, num_heads // num_kv_heads if tables.per_head else 1)

    def forward(
        self, softmax_scale: float, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse of these keys."""
        from dist_attn_kernels.block_sparse import block_sparse_forward  # noqa: PLC0415 - triton

        assert self.lists is not None
        return block_sparse_forward(q, k, v, self.lists, softmax_scale=softmax_scale)

    def backward(self, softmax_scale: float, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """Return these keys' part of the gradients; the kernels repeat bit by bit."""
        from dist_attn_kernels.block_sparse import block_sparse_backward  # noqa: PLC0415 - triton

        assert self.lists is not None
        return block_sparse_backward(
            saved.dout,
            (saved.q, saved.k, saved.v),
            saved.out,
            saved.lse,
            self.lists,
            softmax_scale=softmax_scale,
        )


@dataclass(frozen=True, eq=False)
class Tables:
    """The arrays of `dist_attn_kernels.lists.Tiles`.

    Attributes:
        per_head: whether heads differ.
        tiles: mask head, query block, key block and kind of each tile.
        intervals: int32 [1 or heads, 2 or 4, q], if tiles are cut by intervals.
        bits: int32 [n, 64, 2], if tiles are cut by bits.
    """

    per_head: bool
    tiles: tuple[IntArray, ...]
    intervals: npt.NDArray[np.int32] | None
    bits: npt.NDArray[np.int32] | None


def list_tiles(
    mask: Mask, positions: tuple[IntArray, IntArray], heads: Sequence[int]
) -> Tables | None:
    """Return the tiles of some query heads, or None if there are none."""
    q_stretches, k_stretches = (stretches(p, BLOCK) for p in positions)
    patterns: dict[Hashable, list[int]] = {}
    for i, head in enumerate(heads):
        patterns.setdefault(mask.pattern(head), []).append(i)
    per_head = len(patterns) > 1
    found = {p: _intervals(mask, positions, heads[of[0]]) for p, of in patterns.items()}
    width = max((0 if x is None else len(x) for x in found.values()), default=0)
    cut_by_intervals = width <= 4 and all(x is not None for x in found.values())
    tiles: list[tuple[IntArray, ...]] = []
    bits: list[npt.NDArray[np.int32]] = []
    num_bits = 0
    for of in patterns.values():
        head = heads[of[0]]
        row, key, full = tile_lists(mask, q_stretches, k_stretches, head).expand(in_order=False)
        kind = np.where(full == 1, FULL, INTERVAL)
        if cut_by_intervals:
            # The last key block reaches past the keys, so it is cut there.
            kind[(key + 1) * BLOCK > len(positions[1])] = INTERVAL
        else:
            row, key, kind, unique = _cut_by_bits(mask, positions, head, (row, key, full))
            kind = np.where(kind < 0, FULL, BITS + num_bits + kind)
            bits.append(unique)
            num_bits += len(unique)
        for i in of if per_head else of[:1]:
            tiles.append((np.full(len(row), i), row, key, kind))
    columns = tuple(
        np.concatenate(c).astype(np.int64, copy=False) for c in zip(*tiles, strict=True)
    )
    if len(columns[0]) == 0:
        return None
    intervals = None
    if cut_by_intervals:
        width = 2 if width <= 2 else 4
        num_tables = len(heads) if per_head else 1
        intervals = np.zeros((num_tables, width, len(positions[0])), dtype=np.int32)
        for pattern, of in patterns.items():
            table = found[pattern]
            assert table is not None
            intervals[of if per_head else [0], : len(table)] = table
    return Tables(per_head, columns, intervals, np.concatenate(bits) if num_bits else None)


def _intervals(mask: Mask, positions: tuple[IntArray, IntArray], head: int) -> IntArray | None:
    """Return each query's keys as local intervals lo, hi, lo, hi..., int64 [2 n, q].

    None if the mask is not made of intervals.
    """
    q_positions, k_positions = positions
    parts = mask.touched(q_positions, q_positions, head)
    if not mask.exact_rows or any(p.keys is not None for p in parts):
        return None
    end = int(k_positions[-1]) + 1
    lo, hi = union_per_row(*stack_parts(parts, len(q_positions), end))
    lo, hi = np.searchsorted(k_positions, lo), np.searchsorted(k_positions, hi)
    # Columns that are empty in most rows are pushed together; what counts is the fullest row.
    order = np.argsort(lo >= hi, axis=1, kind="stable")
    width = max(int((lo < hi).sum(axis=1).max(initial=0)), 1)
    lo, hi = (np.take_along_axis(x, order, 1)[:, :width] for x in (lo, np.maximum(lo, hi)))
    return np.stack([lo, hi], axis=1).transpose(2, 1, 0).reshape(2 * width, -1)


def _cut_by_bits(
    mask: Mask, positions: tuple[IntArray, IntArray], head: int, tiles: Coordinates
) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.int32]]:
    """Evaluate the partial tiles element by element.

    Returns row, key and index of the bits of each tile (-1 for full ones; tiles that turn out empty
    are left out), and the different bits, int32 [n, 64, 2].
    """
    row, key, full = tiles
    # A tile that reaches past the tokens is partial: the kernel must not see what is not there.
    ends = (np.maximum(row, key) + 1) * BLOCK
    partial = np.flatnonzero((full == 0) | (ends > min(len(p) for p in positions)))
    packed = []
    for start in range(0, len(partial), TILES_AT_A_TIME):
        some = partial[start : start + TILES_AT_A_TIME]
        q, q_inside = _tile_positions(positions[0], row[some])
        k, k_inside = _tile_positions(positions[1], key[some])
        allowed = mask.allows(q[:, :, None], k[:, None, :], head)
        allowed = allowed & q_inside[:, :, None] & k_inside[:, None, :]
        packed.append(np.packbits(allowed, axis=-1, bitorder="little").reshape(len(some), -1))
    size = BLOCK * BLOCK // 8
    every = np.concatenate(packed) if packed else np.empty((0, size), dtype=np.uint8)
    unique, index = _different(every)
    kind = np.full(len(row), -1)
    kind[partial] = index
    keep = np.ones(len(row), dtype=bool)
    keep[partial] = every.any(axis=1)
    bits = np.ascontiguousarray(unique).view("<i4").reshape(-1, BLOCK, 2)
    return row[keep], key[keep], kind[keep], bits


def _different(rows: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], IntArray]:
    """Return the different rows and which of them each row is, as np.unique does, but by a hash."""
    _, first, index = np.unique(_hash(rows), return_index=True, return_inverse=True)
    if np.array_equal(rows[first][index], rows):
        return rows[first], index
    different, index = np.unique(rows, axis=0, return_inverse=True)  # two rows have one hash
    return different, index.reshape(-1)


def _hash(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    words = rows.view("<u8")
    factors = np.random.default_rng(0).integers(0, 1 << 64, words.shape[1], dtype=np.uint64)
    mixed = (words ^ (words >> np.uint64(29))) * factors
    return np.asarray(mixed.sum(axis=1, dtype=np.uint64))


def _tile_positions(positions: IntArray, tiles: IntArray) -> tuple[IntArray, np.ndarray]:
    """Return the positions of each tile's tokens [n, 64], and which of them are there."""
    index = tiles[:, None] * BLOCK + np.arange(BLOCK)
    inside = index < len(positions)
    return positions[np.minimum(index, len(positions) - 1)], inside
