"""Query blocks that share keys are paired, and the tables say of every tile who lists it."""

from __future__ import annotations

import pytest
import torch

from dist_attn_kernels import rules
from dist_attn_kernels.lists import FULL, Tiles, build_lists, num_blocks
from dist_attn_kernels.mates import mate_tables
from tests.unit.kernels import block_sparse_cases as cases


def tables(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    coords = (tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds)
    coords = tuple(t.to(torch.int64) for t in coords)
    return mate_tables(coords, (num_blocks(tiles.q_len), num_blocks(tiles.k_len)))


def read_back(made: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[tuple[int, ...]]:
    """Every tile that the tables name, as the kernel reads them."""
    rows, steps, kinds = (t.tolist() for t in made)
    found = []
    for head, first_block, second_block, first, count, first_kind, masked in rows:
        for i in range(count):
            entry = steps[first + i]
            assert entry & 3, "nobody lists this step"
            for side, block in enumerate((first_block, second_block)):
                kind = kinds[first_kind + i][side] if i < masked else FULL
                if entry >> side & 1:
                    found.append((head, block, entry >> 2, kind))
                else:
                    assert i >= masked or kind == 0
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("q_len", "k_len"), [(900, 1300), (1001, 640), (40, 40), (9000, 700)])
def test_every_tile_is_listed_once(q_len, k_len, seed):
    tiles = cases.thinned(cases.random_mixed_tiles(q_len, k_len, 3, seed), 0.2)
    want = zip(tiles.heads, tiles.q_blocks, tiles.k_blocks, tiles.kinds, strict=True)
    found = read_back(tables(tiles))
    assert sorted(found) == sorted(tuple(map(int, tile)) for tile in want)


def test_no_tiles():
    rows, steps, kinds = tables(cases.thinned(cases.random_mixed_tiles(70, 70, 1, 0), 0.0))
    assert (rows.shape, steps.shape, kinds.shape) == ((0, 7), (1,), (0, 2))


def test_alike_blocks_find_each_other_wherever_they_lie():
    """Blocks i and i + 20 list the same keys, neighbours none in common."""
    q = torch.arange(40).repeat_interleave(5)
    k = (q % 20) * 5 + torch.arange(5).repeat(40)
    tiles = Tiles(40 * 64, 100 * 64, 1, q * 0, q, k, torch.full_like(q, FULL))
    rows, steps, _ = tables(tiles)
    assert (rows[:, 1] - rows[:, 2]).abs().tolist() == [20] * 20
    assert steps.numel() - 1 == 100
    assert bool(((steps[:-1] & 3) == 3).all())


def test_mates_share_more_than_neighbours_at_random():
    generator = torch.Generator().manual_seed(0)
    tiles = rules.random_tiles(16384, 2, density=0.1, block=64, generator=generator)
    _, steps, _ = tables(tiles)
    neighbours = torch.unique(tiles.heads * 2**20 + tiles.q_blocks // 2 * 2**10 + tiles.k_blocks)
    saved, by_chance = (1 - n / tiles.heads.numel() for n in (steps.numel() - 1, len(neighbours)))
    assert saved > 0.11
    assert by_chance < 0.08


def test_sides_take_turns():
    """No side waits long for its next step while the other has its own."""
    generator = torch.Generator().manual_seed(0)
    tiles = rules.random_tiles(16384, 1, density=0.1, block=64, generator=generator)
    rows, steps, _ = tables(tiles)
    first, count, masked = rows[0, 3], rows[0, 4], rows[0, 6]
    marks = steps[first + masked : first + count] & 3
    for side in (1, 2):
        passed = (marks & side) == 0
        runs = "".join("x" if p else "." for p in passed.tolist()).split(".")
        assert max(map(len, runs)) <= 3


def test_lists_for_little_in_common_have_them():
    generator = torch.Generator().manual_seed(0)
    tiles = rules.random_tiles(8192, 2, density=0.1, block=64, generator=generator)
    narrow = build_lists(tiles).narrow
    assert narrow is not None
    assert narrow.mate_steps.dtype == torch.int32
    blocks = narrow.mates[:, 0] * 128 + narrow.mates[:, 1:3].t()
    assert sorted(blocks.flatten().tolist()) == list(range(256))
