"""Pairs of query blocks that share key blocks, for masks whose neighbours share few.

Where each query block lists its own tenth of the key blocks, two of them have a tenth of their
lists in common; of a hundred others one has a quarter. What two blocks share is loaded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

FULL = 1
#: Query blocks, alike in the length of their lists, among which mates are looked for.
AMONG = 128
#: Times that every block asks for the best of those left; the few that remain are taken in turn.
ROUNDS = 12
#: Elements of an incidence matrix built at a time.
MOST_ELEMENTS = 2**26


def mate_tables(
    coords: tuple[Tensor, Tensor, Tensor, Tensor], sizes: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of the pairs.

    Args:
        coords: heads, query blocks, key blocks and kinds of the tiles.
        sizes: query blocks and key blocks.

    Returns:
        rows [R, 7]: mask head, query block, query block (behind the last for none), first step,
        steps, first kind, masked steps; longest first within a head. steps [S + 1]: key block << 2,
        bit 0 if the first query block lists it, bit 1 for the second; one to spare at the end.
        kinds [M, 2]: kinds of the masked steps by query block.
    """
    heads, q_blocks, k_blocks, kinds = coords
    num_q, num_k = sizes
    names, row, counts = torch.unique(
        heads * num_q + q_blocks, return_inverse=True, return_counts=True
    )
    item, side = _choose(names // num_q, counts, row, k_blocks, num_k)
    num_items = int(item.max()) + 1 if item.numel() else 0
    pairs = torch.full((num_items, 2), num_q, dtype=torch.int64, device=heads.device)
    pairs[item, side] = names % num_q
    head = torch.zeros(num_items, dtype=torch.int64, device=heads.device)
    head[item] = names // num_q
    keys, inverse = torch.unique(item[row] * num_k + k_blocks, return_inverse=True)
    pair = torch.zeros(keys.numel(), 2, dtype=torch.int64, device=heads.device)
    pair[inverse, side[row]] = kinds
    of, block = keys // num_k, keys % num_k
    listed = pair != 0
    marks = listed[:, 0] + 2 * listed[:, 1].to(torch.int64)
    masked = (listed & (pair != FULL)).any(1)
    order = torch.argsort(_places(of, marks, masked))
    of, block, pair, marks, masked = (t[order] for t in (of, block, pair, marks, masked))
    steps = torch.bincount(of, minlength=num_items)
    num_masked = torch.bincount(of[masked], minlength=num_items)
    columns = [head, pairs[:, 0], pairs[:, 1], _starts(steps), steps]
    table = torch.stack([*columns, _starts(num_masked), num_masked], 1)
    longest = int(steps.max()) + 1 if num_items else 1
    table = table[torch.argsort(head * longest - steps, stable=True)]
    entries = torch.cat([block << 2 | marks, block.new_zeros(1)])
    return table, entries, pair[masked]


def _starts(counts: Tensor) -> Tensor:
    """Exclusive running sum."""
    return torch.cumsum(counts, 0) - counts


def _places(item: Tensor, marks: Tensor, masked: Tensor) -> Tensor:
    """Sort keys: by item, masked steps first, then each side's steps spread evenly.

    A side passes over the other's steps. Taken by turns both have work all the time; within a side
    key blocks stay in order, so that programs read the same ones at about the same time.
    """
    group = (item * 2 + ~masked) * 4 + marks
    names, inverse, counts = torch.unique_consecutive(
        group[torch.argsort(group, stable=True)], return_inverse=True, return_counts=True
    )
    order = torch.argsort(group, stable=True)
    inside = torch.arange(group.numel(), device=group.device) - _starts(counts)[inverse]
    share = (inside.double() + 0.5) / counts[inverse]
    place = torch.empty_like(share)
    place[order] = names[inverse] // 4 + share * 0.999
    return place


def _choose(
    head: Tensor, counts: Tensor, row: Tensor, k_blocks: Tensor, num_k: int
) -> tuple[Tensor, Tensor]:
    """Item and side of every query block that lists anything.

    The blocks of a head are sorted by length and cut into groups of AMONG. Every block asks for
    the one with which it shares most, less a quarter of the difference of their lengths; those that
    ask for each other are mates; again, among those left.
    """
    device, num_rows = head.device, head.numel()
    longest = int(counts.max()) + 1 if num_rows else 1
    order = torch.argsort(head * longest - counts, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(num_rows, device=device)
    per_head = torch.bincount(head)
    inside = rank - _starts(per_head)[head]
    groups_before = _starts(-(-per_head // AMONG))
    group, place = groups_before[head] + inside // AMONG, inside % AMONG
    num_groups = int(group.max()) + 1 if num_rows else 0
    mate = torch.empty(num_groups, AMONG, dtype=torch.int64, device=device)
    length = torch.full((num_groups, AMONG), -1, dtype=torch.int64, device=device)
    length[group, place] = counts
    at_a_time = max(1, MOST_ELEMENTS // (AMONG * num_k))
    tile_group, tile_place = group[row], place[row]
    for start in range(0, num_groups, at_a_time):
        some = slice(start, min(start + at_a_time, num_groups))
        mine = (tile_group >= some.start) & (tile_group < some.stop)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        lists = torch.zeros(some.stop - start, AMONG, num_k, dtype=dtype, device=device)
        lists[tile_group[mine] - start, tile_place[mine], k_blocks[mine]] = 1
        mate[some] = _mates((lists @ lists.mT).float(), length[some])
    # The first of a pair names it.
    first = torch.minimum(mate[group, place], place)
    item = torch.unique(group * AMONG + first, return_inverse=True)[1]
    return item, (place != first).to(torch.int64)


def _mates(shared: Tensor, length: Tensor) -> Tensor:
    """Each block's mate in its group, or itself for none; `length` is -1 where there is no block.

    Numerics: a fraction that depends on the place alone decides among equals, the same every time.
    """
    groups, size = length.shape
    device = length.device
    at = torch.arange(size, device=device)
    wide = length.float()
    score = shared - (wide[:, :, None] - wide[:, None, :]).abs() / 4
    mixed = torch.minimum(at[:, None], at) * 40503 + torch.maximum(at[:, None], at) * 30103
    score = score + (mixed % 9973).float() / 9973 / 8
    free = length >= 0
    mate = at.expand(groups, size).clone()
    for _ in range(ROUNDS):
        both = free[:, :, None] & free[:, None, :] & (at[:, None] != at)
        best, asked = torch.where(both, score, float("-inf")).max(2)
        mutual = (asked.gather(1, asked) == at) & torch.isfinite(best)
        mate = torch.where(mutual, asked, mate)
        free = free & ~mutual
    # Who is left: the first with the second, the third with the fourth.
    turn = torch.cumsum(free, 1) - 1
    number = torch.where(free, turn, size)
    order = torch.argsort(number, stable=True)
    left = free.sum(1, keepdim=True)
    other = torch.where((turn ^ 1) < left, turn ^ 1, turn).clamp(0, size - 1)
    return torch.where(free, order.gather(1, other), mate)
