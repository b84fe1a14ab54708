"""Which ranks form the nodes of a group, and the sets that communicate."""

from __future__ import annotations

import pytest

from dist_attn.errors import PlanError
from dist_attn.groups import two_level_sets
from dist_attn.training.topology import Topology

NODES_OF_FOUR = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)


@pytest.fixture
def _world_of_24(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 24)


@pytest.mark.parametrize(
    ("ranks", "inner_size"),
    [
        (range(12), 4),  # three whole nodes
        (range(2, 6), 2),  # two halves
        ((0, 1, 4, 5, 8, 9), 2),
        (range(1, 12), 1),  # 3, 4 and 4 have no common size
        ((0, 1), 2),  # one node: the outer level is one rank
    ],
)
def test_nodes_come_from_the_cluster(ranks: range, inner_size: int) -> None:
    topology = Topology(12, 0, node_of=NODES_OF_FOUR)
    assert topology.inner_size(ranks, "ulysses+ring") == inner_size
    assert topology.inner_size(ranks, "ring") is None
    assert Topology(12, 0).inner_size(ranks, "ring+ring") == len(ranks)
    assert Topology(12, 0, inner_degree=3).inner_size(ranks, "ring+ring") == 3


@pytest.mark.usefixtures("_world_of_24")
def test_the_sets_of_all_tensor_ranks() -> None:
    topology = Topology(24, 5, 2, node_of=NODES_OF_FOUR)
    ranks = tuple(range(8))
    found = topology.rank_sets(ranks, "ulysses+gather")
    first, second = (tuple(2 * p + s for p in ranks) for s in range(2))
    assert found == [*two_level_sets(first, 4), *two_level_sets(second, 4)]
    assert topology.rank_sets(ranks, "gather") == [first, second]
    assert topology.members(ranks) == second


@pytest.mark.usefixtures("_world_of_24")
def test_nodes_that_do_not_divide_a_group_are_refused() -> None:
    with pytest.raises(PlanError, match="nodes of 3 ranks do not divide a group of 4"):
        Topology(12, 0, inner_degree=3).rank_sets(range(4), "ring+ring")
