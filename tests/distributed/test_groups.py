"""Process groups are shared, bounded, and refused to those who are not in them."""

import pytest
import torch
import torch.distributed as dist

from dist_attn.errors import PlanError
from dist_attn.groups import GroupPool, single_rank_group, two_level_sets
from tests.ranks import run_ranks


def sum_in(pool: GroupPool, ranks: tuple[int, ...]) -> float | None:
    if dist.get_rank() not in ranks:
        return None
    group = pool.get(ranks)
    assert group.ranks[group.cp_rank] == dist.get_rank()
    assert group.peer(group.cp_rank + 1) in ranks
    x = torch.tensor(float(dist.get_rank()))
    if group.process_group is not None:
        dist.all_reduce(x, group=group.process_group)
    return x.item()


def use_pool() -> list[float | None]:
    pool = GroupPool(capacity=2)
    results = []
    for sets in ([(0, 1), (2,)], [(1, 2), (0,)], [(0, 1)], [(0, 2), (0, 1, 2)], [(1, 2)]):
        pool.ensure(sets)
        results += [sum_in(pool, s) for s in sets]
        assert len(pool) <= 2
    pool.close()
    assert len(pool) == 0
    return results


def test_groups_come_and_go():
    rank0, rank1, rank2 = run_ranks(use_pool, 3)
    assert rank0 == [1, None, None, 0, 1, 2, 3, None]
    assert rank1 == [1, None, 3, None, 1, None, 3, 3]
    assert rank2 == [None, 2, 3, None, None, 2, 3, 3]


def misuse_pool() -> list[str]:
    pool = GroupPool(capacity=1)
    messages = []
    for call in (
        lambda: pool.ensure([(0, 1), (1, 2)]),
        lambda: pool.ensure([(1, 0)]),
        lambda: pool.ensure([(0, 3)]),
        lambda: pool.get([r for r in range(3) if r != dist.get_rank()]),
        lambda: pool.get(sorted({dist.get_rank(), (dist.get_rank() + 1) % 3})),
    ):
        with pytest.raises(PlanError) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_misuse_is_refused():
    for messages in run_ranks(misuse_pool, 3):
        wanted = ["the pool holds 1", "ascending", "below 3", "not in", "call ensure"]
        assert all(w in m for w, m in zip(wanted, messages, strict=True))


def two_levels() -> tuple[tuple[int, ...], tuple[int, ...]]:
    pool = GroupPool()
    pool.ensure(two_level_sets(range(4), 2))
    group = pool.get(range(4), inner_size=2)
    with pytest.raises(PlanError, match="do not divide"):
        pool.get(range(4), inner_size=3)
    return group.inner.ranks, group.outer.ranks


def test_nodes_of_a_group():
    assert run_ranks(two_levels, 4) == [
        ((0, 1), (0, 2)),
        ((0, 1), (1, 3)),
        ((2, 3), (0, 2)),
        ((2, 3), (1, 3)),
    ]


def test_a_single_rank_needs_no_process_group():
    group = single_rank_group(5)
    assert (group.ranks, group.cp_rank, group.cp_size) == ((5,), 0, 1)
    assert group.process_group is None
