"""From a mask and the tokens of two ranks to the lists that the block-sparse kernels walk."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_attn.attention.partial_tiles import Bounds, Cut, Partial
from dist_attn.layout import IntArray
from dist_attn.masks import Mask, TileLists, stretches, tile_lists
from dist_attn_kernels.lists import BITS, BLOCK, BlockLists
from dist_attn_kernels.run_tables import lists_from_runs
from dist_attn_kernels.runs import TileRuns
from dist_attn_kernels.segments import Saved


class BlockSparse:
    """The lists of some query heads on one device, and the kernels on them.

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
        runs = list_runs(mask, positions, heads, num_kv_heads)
        self.lists: BlockLists | None = None if runs is None else lists_from_runs(runs, device)

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


def list_runs(
    mask: Mask,
    positions: tuple[IntArray, IntArray],
    heads: Sequence[int],
    num_kv_heads: int,
) -> TileRuns | None:
    """Return the tiles of some query heads, or None if there are none.

    Heads of one pattern share their tiles. Where all heads that read one key/value head are alike,
    the lists are those of key/value heads.
    """
    groups, group_of = _groups(mask, heads, num_kv_heads)
    q_stretches, k_stretches = (stretches(p, BLOCK) for p in positions)
    tiles: dict[Hashable, _HeadTiles] = {}
    for head in (h for group in groups for h in group):
        pattern = mask.pattern(head)
        if pattern not in tiles:
            lists = tile_lists(mask, q_stretches, k_stretches, head)
            tiles[pattern] = _HeadTiles(lists, len(positions[1]))
    first_of = {mask.pattern(h): h for group in reversed(groups) for h in reversed(group)}
    bounds: dict[Hashable, Bounds] = {}
    rows: dict[Hashable, list[IntArray]] = {}
    for pattern, head in first_of.items():
        rows.setdefault(mask.interval_pattern(head), []).append(tiles[pattern].partial.row)
    cuts: dict[Hashable, Cut] = {}
    for pattern, head in first_of.items():
        alike = mask.interval_pattern(head)
        if alike not in bounds:
            asked = np.flatnonzero(np.bincount(np.concatenate(rows[alike])))
            bounds[alike] = Bounds(mask, positions, head, asked)
        cuts[pattern] = bounds[alike].cut(head, tiles[pattern].partial)
    every = [h for group in groups for h in group]
    runs = _put_together(
        [(tiles[mask.pattern(h)], cuts[mask.pattern(h)]) for h in every],
        [bounds[mask.interval_pattern(h)].table for h in every],
        (len(positions[0]), len(positions[1])),
        (len(groups[0]), np.array(group_of)),
    )
    return runs if len(runs.full) + len(runs.partial[0]) else None


class _HeadTiles:
    """The tiles of one head: its order of key blocks, runs of full tiles, and partial ones.

    Attributes:
        key_of_place: int64 [key blocks].
        full: int64 [n, 2] intervals of places on a line, a stretch of it for each query block.
        partial: the other tiles.
    """

    def __init__(self, lists: TileLists, num_keys: int) -> None:
        num_k = lists.num_keys
        # The last key block may reach past the keys: it is cut there.
        cut_last = num_keys % BLOCK != 0
        row, key = [], []
        orders, begins, ends = [], [], []
        offset = 0
        for s in lists.full:
            begin, end = s.begin, s.end
            if cut_last and len(s.tiles) and s.tiles[-1] == num_k - 1:
                cut = np.flatnonzero(((begin < end) & (end == len(s.tiles))).any(axis=1))
                row.append(cut)
                key.append(np.full(len(cut), num_k - 1))
                end = np.minimum(end, len(s.tiles) - 1)
            line, column = np.nonzero(begin < end)
            at = line * num_k + offset
            begins.append(at + begin[line, column])
            ends.append(at + end[line, column])
            orders.append(s.tiles)
            offset += len(s.tiles)
        for s in lists.partial:
            s_row, s_key = s.expand()
            row.append(s_row)
            key.append(s_key)
        nothing = np.empty(0, dtype=np.int64)
        self.key_of_place = np.concatenate([*orders, nothing])
        if len(self.key_of_place) < num_k:
            others = np.ones(num_k, dtype=bool)
            others[self.key_of_place] = False
            self.key_of_place = np.append(self.key_of_place, np.flatnonzero(others))
        self.partial = Partial(np.concatenate([*row, nothing]), np.concatenate([*key, nothing]))
        self.full = _joined(
            np.concatenate([*begins, nothing]), np.concatenate([*ends, nothing]), num_k
        )


def _joined(begin: IntArray, end: IntArray, num_k: int) -> IntArray:
    """Put disjoint runs in order, and those together that touch in one row."""
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], end[order]
    opens = np.ones(len(begin), dtype=bool)
    opens[1:] = (begin[1:] != end[:-1]) | (begin[1:] % num_k == 0)
    closes = np.append(opens[1:], True)[: len(end)]
    return np.stack([begin[opens], end[closes]], axis=1)


def _groups(
    mask: Mask, heads: Sequence[int], num_kv_heads: int
) -> tuple[list[list[int]], list[int]]:
    """Return the groups of heads that differ, and for each key/value head of the lists its group.

    Lists have one head for all, one for each key/value head, or one for each query head.
    """
    patterns = [mask.pattern(h) for h in heads]
    if len(set(patterns)) == 1:
        return [[heads[0]]], [0]
    repeats = len(heads) // num_kv_heads
    readers = [patterns[i : i + repeats] for i in range(0, len(heads), repeats)]
    size = 1 if all(len(set(r)) == 1 for r in readers) else repeats
    found: dict[tuple[Hashable, ...], int] = {}
    group_of = [found.setdefault(tuple(r), len(found)) for r in readers]
    firsts = [group_of.index(g) * repeats for g in range(len(found))]
    return [list(heads[i : i + size]) for i in firsts], group_of


def _put_together(
    heads: list[tuple[_HeadTiles, Cut]],
    tables: list[IntArray | None],
    lengths: tuple[int, int],
    groups: tuple[int, IntArray],
) -> TileRuns:
    """Number the tiles of all heads that differ through."""
    q_len, k_len = lengths
    num_q, num_k = -(-q_len // BLOCK), -(-k_len // BLOCK)
    words: dict[int, int] = {}
    num_words = 0
    for _, cut in heads:
        if id(cut) not in words:
            words[id(cut)] = num_words
            num_words += len(cut.words)
    columns: list[list[IntArray]] = [[], [], [], []]
    full = []
    for i, (tiles, cut) in enumerate(heads):
        full.append(tiles.full + i * num_q * num_k)
        kind = np.where(cut.kind >= BITS, cut.kind + words[id(cut)], cut.kind)
        found = (np.full(len(kind), i), cut.tiles.row, cut.tiles.key, kind)
        for column, x in zip(columns, found, strict=True):
            column.append(x)
    different = {id(cut): cut.words for _, cut in heads}
    bits = np.concatenate([*different.values()]) if num_words else None
    p_head, p_row, p_key, p_kind = (np.concatenate(c) for c in columns)
    return TileRuns(
        q_len=q_len,
        k_len=k_len,
        heads_per_kv=groups[0],
        group_of=groups[1],
        key_of_place=np.stack([tiles.key_of_place for tiles, _ in heads]),
        full=np.concatenate(full),
        partial=(p_head, p_row, p_key, p_kind),
        intervals=_intervals(tables, lengths),
        bits=None if bits is None else bits.view("<i4").reshape(-1, BLOCK, 2),
    )


def _intervals(tables: list[IntArray | None], lengths: tuple[int, int]) -> np.ndarray | None:
    """Return one table for all heads where they agree, else one for each; None without any."""
    given = {id(t): t for t in tables if t is not None}
    if not given:
        return None
    width = max(len(t) for t in given.values())
    first = next(iter(given.values()))
    if all(t is first or np.array_equal(t, first) for t in given.values()):
        # Heads without a table have no tile that is cut by one.
        return first.astype(np.int32)[None]
    every = np.zeros((len(tables), width, lengths[0]), dtype=np.int32)
    for of, table in zip(every, tables, strict=True):
        if table is None:
            of[1] = lengths[1]
        else:
            of[: len(table)] = table
    return every
