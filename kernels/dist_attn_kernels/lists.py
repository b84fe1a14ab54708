"""Block lists: which 64x64 tiles of the attention matrix the kernels visit, as compact tables.

A mask is given as `Tiles`, the coordinates of every tile that is not empty, in any order. A tile is
`FULL` (every score counts) or partial; a partial tile is cut by a rule that the kernel evaluates:
`INTERVAL` (each query sees the keys of one or two half-open intervals: causal, window, documents,
sinks, prefixes and their combinations) or, at `BITS + i`, by bit mask number i (anything else).

`build_lists` turns tiles into the two tables that the kernels walk:

- rows, for the forward: per (mask head, 128 queries) the listed key blocks of 64, two to a step.
- columns, for the backward: per (mask head, two key blocks of 64) the listed query blocks of 64.
  The two key blocks need not be neighbours: blocks that are read by the same queries share a
  column, because a strided block is read by every later query and its neighbour by a few.

In both, steps that need a mask come first, and the items of a head are sorted longest first. The
mask's heads may be one for all, one per key/value head or one per query head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
ROW_QUERIES = 2 * BLOCK
EMPTY, FULL, INTERVAL, BITS = 0, 1, 2, 3
#: Heads whose columns are walked at the same time: enough of them to keep a GPU's programs alike,
#: few enough that L2 holds the queries that they read.
HEADS_TOGETHER = 8
#: Tiles that pairs of blocks visit per listed one from which single blocks are listed, too.
NARROW_FROM = 1.5
#: In an entry of a column: the query head inside its group, above the query block.
HEAD_SHIFT = 24


@dataclass(frozen=True)
class Tiles:
    """The tiles of 64x64 that are not empty, as coordinates.

    `heads`, `q_blocks`, `k_blocks` and `kinds` are int tensors of one length; a tile occurs once.
    `intervals` int32 [mask heads or 1, 2 or 4, q_len] holds rows lo, hi (, lo, hi) of key indices:
    a query of a tile of kind INTERVAL sees key k if lo <= k < hi holds for one of the pairs.
    `bits` int32 [n, 64, 2] holds 64 bits a row, low bit first, for kinds BITS + i.
    """

    q_len: int
    k_len: int
    num_mask_heads: int
    heads: Tensor
    q_blocks: Tensor
    k_blocks: Tensor
    kinds: Tensor
    intervals: Tensor | None = None
    bits: Tensor | None = None


@dataclass(frozen=True)
class NarrowLists:
    """Tables for masks whose neighbouring blocks have little in common: one block to an item.

    rows [R, 6]: mask head, query block, first step, steps, first kind, masked steps.
    row_blocks [S]: the key block of a step. row_kinds [M]: the kind of a masked step.
    cols [C, 7], col_entries [E], col_kinds [N, 2]: as in `BlockLists`, with the key block twice.
    """

    rows: Tensor
    row_blocks: Tensor
    row_kinds: Tensor
    cols: Tensor
    col_entries: Tensor
    col_kinds: Tensor


@dataclass(frozen=True)
class BlockLists:
    """What the kernels walk; every tensor is int32.

    rows [R, 6]: mask head, row tile, first step, steps, first kind, masked steps.
    row_blocks [S, 2]: the two key blocks of a step. row_kinds [M, 4]: kinds of a masked step in the
    order (upper queries, first block), (upper, second), (lower, first), (lower, second).
    cols [C, 7]: mask key head, key block, key block, first entry, entries, first kind, masked
    entries.
    col_entries [E]: query block | head in group << 24. col_kinds [N, 2]: kinds by key block.
    Rows are sorted by mask head, then longest first; columns, of which a head has few long ones, by
    HEADS_TOGETHER mask heads, then longest first.
    """

    q_len: int
    k_len: int
    num_mask_heads: int
    num_mask_kv_heads: int
    rows: Tensor
    row_blocks: Tensor
    row_kinds: Tensor
    cols: Tensor
    col_entries: Tensor
    col_kinds: Tensor
    intervals: Tensor
    bits: Tensor | None
    #: Tiles that are visited, for the reckoning of work: listed 64x64 tiles over all mask heads.
    num_tiles: int
    has_empty_rows: bool
    has_empty_cols: bool
    #: In addition, where pairs of blocks would double the work.
    narrow: NarrowLists | None = None

    @property
    def walked_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, blocks and kinds that the Hopper kernels walk."""
        of = self if self.narrow is None else self.narrow
        return of.rows, of.row_blocks, of.row_kinds

    @property
    def walked_cols(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns, entries and kinds that the Hopper kernels walk."""
        of = self if self.narrow is None else self.narrow
        return of.cols, of.col_entries, of.col_kinds

    @property
    def num_intervals(self) -> int:
        """Intervals a query: 1 or 2."""
        return self.intervals.shape[1] // 2

    @property
    def nbytes(self) -> int:
        """Device memory of all tables."""
        tables = [self.rows, self.row_blocks, self.row_kinds, self.cols, self.col_entries]
        tables += [self.col_kinds, self.intervals] + ([] if self.bits is None else [self.bits])
        if self.narrow is not None:
            tables += [*self.walked_rows, *self.walked_cols]
        return sum(t.numel() * t.element_size() for t in tables)


def num_blocks(length: int) -> int:
    """Blocks of 64 that hold `length` tokens."""
    return -(-length // BLOCK)


def build_lists(tiles: Tiles, heads_per_kv: int = 1) -> BlockLists:
    """Build the kernels' tables on the device of the tiles.

    Args:
        tiles: the tiles that are not empty.
        heads_per_kv: how many of the MASK's heads share one key/value head; 1 unless the mask has
            one head per query head and the model has grouped queries.

    Raises:
        ValueError: heads, coordinates or masks that do not fit together.
    """
    _check(tiles, heads_per_kv)
    device = tiles.heads.device
    intervals = tiles.intervals
    if intervals is None:
        intervals = torch.zeros(1, 2, tiles.q_len, dtype=torch.int32, device=device)
        intervals[:, 1] = tiles.k_len
    coords = [t.to(torch.int64) for t in (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds)]
    heads, q_blocks, k_blocks, kinds = coords
    # The last key block may reach past the keys: its columns there must be masked.
    if tiles.k_len % BLOCK:
        tail = (k_blocks == tiles.k_len // BLOCK) & (kinds == FULL)
        if tiles.intervals is not None and bool(tail.any()):
            raise ValueError(
                f"key block {tiles.k_len // BLOCK} holds {tiles.k_len % BLOCK} of {BLOCK} keys and "
                f"cannot be FULL; list it as INTERVAL"
            )
        kinds = torch.where(tail, INTERVAL, kinds)
    rows, row_blocks, row_kinds = _rows(tiles, heads, q_blocks, k_blocks, kinds)
    cols, col_entries, col_kinds = _cols(tiles, heads_per_kv, (heads, q_blocks, k_blocks, kinds))
    num_q = num_blocks(tiles.q_len)
    with_keys = torch.unique(heads * num_q + q_blocks).numel()
    listed = torch.unique(heads // heads_per_kv * num_blocks(tiles.k_len) + k_blocks).numel()
    num_kv = tiles.num_mask_heads // heads_per_kv
    return BlockLists(
        q_len=tiles.q_len,
        k_len=tiles.k_len,
        num_mask_heads=tiles.num_mask_heads,
        num_mask_kv_heads=num_kv,
        rows=rows.to(torch.int32).contiguous(),
        row_blocks=row_blocks.to(torch.int32).contiguous(),
        row_kinds=row_kinds.to(torch.int32).contiguous(),
        cols=cols.to(torch.int32).contiguous(),
        col_entries=col_entries.to(torch.int32).contiguous(),
        col_kinds=col_kinds.to(torch.int32).contiguous(),
        intervals=intervals.to(torch.int32).contiguous(),
        bits=None if tiles.bits is None else tiles.bits.to(torch.int32).contiguous(),
        num_tiles=heads.numel(),
        has_empty_rows=with_keys < tiles.num_mask_heads * num_q,
        has_empty_cols=listed < num_kv * num_blocks(tiles.k_len),
        narrow=_narrow(tiles, heads_per_kv, (heads, q_blocks, k_blocks, kinds))
        if max(row_blocks.numel(), col_entries.numel()) * 2 > NARROW_FROM * heads.numel()
        else None,
    )


def _check(tiles: Tiles, heads_per_kv: int) -> None:
    n = tiles.heads.numel()
    if any(t.numel() != n for t in (tiles.q_blocks, tiles.k_blocks, tiles.kinds)):
        raise ValueError("heads, q_blocks, k_blocks and kinds of the tiles must have one length")
    if heads_per_kv < 1 or tiles.num_mask_heads % heads_per_kv:
        raise ValueError(
            f"the mask's heads must be a multiple of heads_per_kv, got {tiles.num_mask_heads} and "
            f"{heads_per_kv}"
        )
    if tiles.q_len <= 0 or tiles.k_len <= 0 or num_blocks(tiles.q_len) >= 1 << HEAD_SHIFT:
        raise ValueError(f"no lists for {tiles.q_len} queries and {tiles.k_len} keys")
    if tiles.intervals is not None:
        heads, bounds, length = tiles.intervals.shape
        fits = heads in (1, tiles.num_mask_heads) and bounds in (2, 4) and length == tiles.q_len
        if not fits:
            raise ValueError(
                f"intervals must be [1 or {tiles.num_mask_heads}, 2 or 4, {tiles.q_len}], "
                f"got {list(tiles.intervals.shape)}"
            )
    if not n:
        return
    limits = {
        "heads": (tiles.heads, tiles.num_mask_heads),
        "q_blocks": (tiles.q_blocks, num_blocks(tiles.q_len)),
        "k_blocks": (tiles.k_blocks, num_blocks(tiles.k_len)),
        "kinds": (tiles.kinds, BITS + (0 if tiles.bits is None else tiles.bits.shape[0])),
    }
    for name, (values, limit) in limits.items():
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} of the tiles must lie in [0, {limit}), got {low} to {high}")


def _starts(counts: Tensor) -> Tensor:
    """Exclusive running sum."""
    return torch.cumsum(counts, 0) - counts


def _longest_first(head: Tensor, length: Tensor) -> Tensor:
    """Order by head, then by falling length; equal items keep their order."""
    return torch.argsort(
        head * (int(length.max()) + 1 if length.numel() else 1) - length, stable=True
    )


def _rows(
    tiles: Tiles, heads: Tensor, q_blocks: Tensor, k_blocks: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    num_tiles = -(-tiles.q_len // ROW_QUERIES)
    num_k = num_blocks(tiles.k_len)
    row = heads * num_tiles + q_blocks // 2
    keys, inverse = torch.unique(row * num_k + k_blocks, return_inverse=True)
    pair = torch.zeros(keys.numel(), 2, dtype=torch.int64, device=keys.device)
    pair[inverse, q_blocks % 2] = kinds
    row, block = keys // num_k, keys % num_k
    # Where the second half of the last tile holds no query, nothing is stored from it.
    if num_blocks(tiles.q_len) % 2:
        pair[:, 1] = torch.where(row % num_tiles == num_tiles - 1, pair[:, 0], pair[:, 1])
    full = (pair == FULL).all(1)
    # Masked entries first; among them those of one half together, so that a half can skip a step.
    rank = torch.where(
        full, 3, torch.where(pair[:, 1] == EMPTY, 0, torch.where(pair[:, 0] == EMPTY, 2, 1))
    )
    order = torch.argsort((row * 4 + rank) * num_k + block)
    row, block, pair, full = row[order], block[order], pair[order], full[order]
    row_id, counts = torch.unique_consecutive(row, return_counts=True)
    masked = torch.zeros_like(counts).index_add_(
        0, torch.repeat_interleave(counts), (~full).to(torch.int64)
    )
    # An odd row gets one entry of nothing, behind the masked ones.
    odd = counts % 2
    steps = (counts + odd) // 2
    item = torch.repeat_interleave(counts)
    inside = torch.arange(row.numel(), device=row.device) - _starts(counts)[item]
    place = _starts(steps)[item] * 2 + inside + odd[item] * full
    total = int(steps.sum()) * 2
    blocks = torch.full((total,), -1, dtype=torch.int64, device=row.device)
    all_kinds = torch.zeros(total, 2, dtype=torch.int64, device=row.device)
    blocks[place] = block
    all_kinds[place] = pair
    blocks = blocks.view(-1, 2)
    # The entry of nothing points at its neighbour's block: a load in bounds that is in use anyway.
    blocks = torch.where(blocks < 0, blocks.flip(1), blocks)
    masked_steps = (masked + odd + 1) // 2
    step_kinds = all_kinds.view(-1, 2, 2).transpose(1, 2).reshape(-1, 4)
    step_item = torch.repeat_interleave(steps)
    step_inside = torch.arange(step_item.numel(), device=row.device) - _starts(steps)[step_item]
    row_kinds = step_kinds[step_inside < masked_steps[step_item]]
    head, tile = row_id // num_tiles, row_id % num_tiles
    columns = [head, tile, _starts(steps), steps, _starts(masked_steps), masked_steps]
    table = torch.stack(columns, 1)[_longest_first(head, steps)]
    return table, blocks, row_kinds


def _cols(
    tiles: Tiles, heads_per_kv: int, coords: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    heads, q_blocks, k_blocks, kinds = coords
    num_q, num_k = num_blocks(tiles.q_len), num_blocks(tiles.k_len)
    kv_head, in_group = heads // heads_per_kv, heads % heads_per_kv
    column, side, pairs = _pair_key_blocks(kv_head * num_k + k_blocks, q_blocks, (num_q, num_k))
    per_column = heads_per_kv * num_q
    # Queries from the last to the first: long columns then read the same queries at the same time.
    position = in_group * num_q + (num_q - 1 - q_blocks)
    keys, inverse = torch.unique(column * per_column + position, return_inverse=True)
    pair = torch.zeros(keys.numel(), 2, dtype=torch.int64, device=keys.device)
    pair[inverse, side] = kinds
    column, position = keys // per_column, keys % per_column
    full = (pair == FULL).all(1)
    order = torch.argsort((column * 2 + full) * per_column + position)
    column, position, pair, full = column[order], position[order], pair[order], full[order]
    entry = (num_q - 1 - position % num_q) | (position // num_q) << HEAD_SHIFT
    counts = torch.bincount(column, minlength=pairs.shape[0])
    masked = torch.bincount(column, weights=(~full).double(), minlength=pairs.shape[0]).to(
        torch.int64
    )
    head = pairs[:, 0]
    columns = [head, pairs[:, 1], pairs[:, 2], _starts(counts), counts, _starts(masked), masked]
    table = torch.stack(columns, 1)[_longest_first(head // HEADS_TOGETHER, counts)]
    return table, entry, pair[~full]


def _narrow(
    tiles: Tiles, heads_per_kv: int, coords: tuple[Tensor, Tensor, Tensor, Tensor]
) -> NarrowLists:
    heads, q_blocks, k_blocks, kinds = coords
    num_q, num_k = num_blocks(tiles.q_len), num_blocks(tiles.k_len)
    rows, order = _items(heads * num_q + q_blocks, k_blocks, kinds)
    item, steps = rows[0], rows[2]
    row_table = torch.stack([item // num_q, item % num_q, *rows[1:]], 1)
    row_order = _longest_first(item // num_q, steps)
    row_blocks, row_kinds = k_blocks[order], kinds[order]
    position = heads % heads_per_kv * num_q + (num_q - 1 - q_blocks)
    cols, order = _items(heads // heads_per_kv * num_k + k_blocks, position, kinds)
    item, block = cols[0] // num_k, cols[0] % num_k
    col_table = torch.stack([item, block, block, *cols[1:]], 1)
    # A head at a time: its columns are alike, and L2 then holds the queries that they read.
    col_order = _longest_first(item, cols[2])
    entries = q_blocks[order] | heads[order] % heads_per_kv << HEAD_SHIFT
    col_kinds = kinds[order][kinds[order] != FULL]
    tables = [
        row_table[row_order], row_blocks, row_kinds[row_kinds != FULL],
        col_table[col_order], entries, torch.stack([col_kinds, col_kinds], 1),
    ]  # fmt: skip
    return NarrowLists(*(t.to(torch.int32).contiguous() for t in tables))


def _items(item: Tensor, place: Tensor, kinds: Tensor) -> tuple[list[Tensor], Tensor]:
    """Items with first entry, entries, first kind and masked entries; and the entries' order."""
    full = kinds == FULL
    order = torch.argsort((item * 2 + full) * (int(place.max()) + 1) + place)
    names, inverse, counts = torch.unique(item, return_inverse=True, return_counts=True)
    masked = torch.bincount(inverse[~full], minlength=names.numel())
    return [names, _starts(counts), counts, _starts(masked), masked], order


def _pair_key_blocks(
    block: Tensor, q_blocks: Tensor, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Put every listed key block into a column of two, in the cheaper of two ways.

    Either neighbours (2i, 2i + 1) share a column, which suits patterns of 128 tokens. Or the blocks
    of a head are sorted by their last query and by how many queries read them, and taken two by
    two: strided blocks then find strided ones, and the others the nearest that is not strided.

    Returns:
        The column and the side of every tile, and [columns, 3]: mask key head and the two key
        blocks (a block without a partner stands twice; its second side then has no entries).
    """
    num_q, num_k = sizes
    listed, inverse, counts = torch.unique(block, return_inverse=True, return_counts=True)
    head = listed // num_k
    last = torch.zeros_like(listed).scatter_reduce_(0, inverse, q_blocks, "amax")
    widest = int(counts.max()) + 1 if counts.numel() else 1
    likeness = (num_q - last) * widest + (widest - counts)
    order = torch.argsort(head * ((num_q + 1) * widest) + likeness, stable=True)
    per_head = torch.unique_consecutive(head[order], return_counts=True)[1]
    inside = torch.arange(order.numel(), device=block.device)
    inside -= torch.repeat_interleave(_starts(per_head), per_head)
    alike, side = torch.empty_like(order), torch.empty_like(order)
    alike[order] = torch.repeat_interleave(_starts((per_head + 1) // 2), per_head) + inside // 2
    side[order] = inside % 2
    pair = head * num_k + listed % num_k // 2
    near = torch.unique(pair, return_inverse=True)[1]
    if torch.unique(near[inverse] * num_q + q_blocks).numel() <= (
        torch.unique(alike[inverse] * num_q + q_blocks).numel()
    ):
        first = torch.ones_like(near, dtype=torch.bool)
        first[1:] = near[1:] != near[:-1]
        alike, side = near, (~first).to(side.dtype)
    num_columns = int(alike.max()) + 1 if alike.numel() else 0
    pairs = torch.full((num_columns, 3), -1, dtype=torch.int64, device=block.device)
    pairs[alike, 0] = head
    pairs[alike, side + 1] = listed % num_k
    pairs[:, 2] = torch.where(pairs[:, 2] < 0, pairs[:, 1], pairs[:, 2])
    return alike[inverse], side[inverse], pairs
