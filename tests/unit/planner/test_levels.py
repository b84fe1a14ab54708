"""Strategies in two levels: where they are allowed, what they cost, and that plans use them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import get_args

import numpy as np
import pytest

from dist_attn.config import PlannerConfig
from dist_attn.config_attention import Strategy
from dist_attn.errors import PlanError
from dist_attn.planner.check import check_plan
from dist_attn.planner.cluster import Cluster, fingerprint
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.plan import Plan
from dist_attn.planner.solve import plan
from tests.unit.planner.conftest import make_cluster, make_shape

TWO_LEVELS = [s for s in get_args(Strategy) if "+" in s]


@pytest.mark.parametrize("strategy", TWO_LEVELS)
def test_they_are_for_groups_of_several_whole_nodes(
    sixteen: tuple[Cluster, CostModel], strategy: str
) -> None:
    _, cost = sixteen
    assert cost.allows(GroupKind(16, strategy, crosses_nodes=True))
    assert not cost.allows(GroupKind(8, strategy))
    assert not cost.allows(GroupKind(8, strategy, crosses_nodes=True))
    assert not cost.allows(GroupKind(12, strategy, crosses_nodes=True))
    by_four = replace(cost, inner_degree=4)
    assert by_four.allows(GroupKind(8, strategy))
    assert by_four.allows(GroupKind(12, strategy, crosses_nodes=True))
    assert not by_four.allows(GroupKind(4, strategy))


def test_an_all_to_all_inside_nodes_needs_heads_for_one_node_only() -> None:
    cluster = make_cluster((4, 8, "h100-80gb"))
    cost = CostModel.derive(make_shape(num_heads=8, num_kv_heads=2), cluster, 3, 8192)
    assert cost.allows(GroupKind(32, "ulysses+ring", crosses_nodes=True))
    assert not cost.allows(GroupKind(32, "ulysses", crosses_nodes=True))
    few = CostModel.derive(make_shape(num_heads=4, num_kv_heads=2), cluster, 3, 8192)
    assert not few.allows(GroupKind(32, "ulysses+ring", crosses_nodes=True))
    assert few.allows(GroupKind(32, "ring+ring", crosses_nodes=True))
    # Between the four nodes a head for each node is enough; in both levels one for each rank.
    assert few.allows(GroupKind(32, "ring+ulysses", crosses_nodes=True))
    assert not cost.allows(GroupKind(32, "ulysses+ulysses", crosses_nodes=True))


def test_bytes_follow_from_the_exchanges(sixteen: tuple[Cluster, CostModel]) -> None:
    """Two nodes of eight: written out for one layer and one token, bf16 and no recomputation."""
    _, cost = sixteen
    shape = cost.shape
    lengths = np.array([1_000_000], dtype=np.int64)
    bare = replace(cost, ring_overlap=0.0)
    kind = GroupKind(16, "ulysses+ring", crosses_nodes=True)
    # A rank holds 1 / 16 of the tokens; 8 of the key/value heads, repeated from 4, go round.
    token = shape.num_layers * shape.head_dim * lengths[0] / 16
    all_to_all = token * 2 * (16 + 8) * 2 * 2 * 7 / 8 / cost.intra_node.bytes_per_s
    ring = token * 2 * 8 * (2 * 2 + 4) / cost.inter_node.bytes_per_s
    assert bare.communication_s(kind, lengths)[0] == pytest.approx(all_to_all + ring)
    double = GroupKind(16, "ring+ring", crosses_nodes=True)
    inside = token * 2 * 4 * (2 * 2 + 4) * 2 * 7 / cost.intra_node.bytes_per_s
    between = token * 2 * 4 * (2 * 2 + 4) / cost.inter_node.bytes_per_s
    assert bare.communication_s(double, lengths)[0] == pytest.approx(max(inside, between))
    # The other way round heads are traded between nodes, where nothing hides it either.
    other = GroupKind(16, "ring+ulysses", crosses_nodes=True)
    between = token * 2 * (16 + 4) * 2 * 2 * 1 / 2 / cost.inter_node.bytes_per_s
    ring = token * 2 * 4 * (2 * 2 + 4) * 7 / cost.intra_node.bytes_per_s
    assert bare.communication_s(other, lengths)[0] == pytest.approx(between + ring)
    both = GroupKind(16, "ulysses+ulysses", crosses_nodes=True)
    traded = token * 2 * (16 + 16) * 2 * 2
    everything = traded * 7 / 8 / cost.intra_node.bytes_per_s
    everything += traded * 1 / 2 / cost.inter_node.bytes_per_s
    assert cost.communication_s(both, lengths)[0] == pytest.approx(everything)
    # A plain ring crosses the slow link at every step.
    plain = bare.communication_s(GroupKind(16, "ring", crosses_nodes=True), lengths)[0]
    assert bare.communication_s(double, lengths)[0] < 0.2 * plain
    # Attention hides what goes between nodes, not the all-to-all.
    hidden = cost.communication_s(kind, lengths)[0]
    assert hidden == pytest.approx(all_to_all)


@pytest.mark.parametrize("strategy", TWO_LEVELS)
def test_plans_use_them_and_stand_up_to_the_checker(
    sixteen: tuple[Cluster, CostModel], strategy: str
) -> None:
    cluster, cost = sixteen
    lengths = (100_000, 3_000, 2_000, 500)
    found = plan(lengths, cluster, cost, PlannerConfig(), [strategy, "ulysses"])
    check_plan(found, lengths, cluster, cost)
    both = {g.strategy for m in found.micro_batches for g in m.groups}
    assert both <= {"local", "ulysses", strategy}
    alone = plan(lengths, cluster, cost, PlannerConfig(), [strategy])
    check_plan(alone, lengths, cluster, cost)
    used = {(g.strategy, g.degree) for m in alone.micro_batches for g in m.groups}
    # Nothing else holds the long document, and degrees inside a node are left out.
    assert used <= {("local", 1), (strategy, 16)}
    assert (strategy, 16) in used
    assert Plan.from_json(alone.to_json()) == alone


def test_a_double_ring_beats_a_plain_one_across_nodes(sixteen: tuple[Cluster, CostModel]) -> None:
    cluster, cost = sixteen
    found = plan((100_000,), cluster, cost, PlannerConfig(), ["ring", "ring+ring"])
    assert found.micro_batches[0].groups[0].strategy == "ring+ring"


def test_plans_without_them_keep_their_fingerprints(sixteen: tuple[Cluster, CostModel]) -> None:
    _, cost = sixteen
    # As of a model that knows nothing of levels.
    data = asdict(cost)
    assert data.pop("source") == "derived"
    assert data.pop("inner_degree") is None
    assert cost.fingerprint() == fingerprint(data)
    assert replace(cost, inner_degree=4).fingerprint() != cost.fingerprint()


def test_a_document_that_only_groups_inside_a_node_could_hold_names_the_remedy(
    four: tuple[Cluster, CostModel],
) -> None:
    cluster, cost = four
    with pytest.raises(PlanError, match=r"add a strategy in one level.*attention\.inner_degree"):
        plan((5000,), cluster, cost, PlannerConfig(), ["ring+ring"])
    by_two = replace(cost, inner_degree=2)
    found = plan((5000,), cluster, by_two, PlannerConfig(), ["ring+ring"])
    assert found.micro_batches[0].groups[0].strategy == "ring+ring"
    with pytest.raises(PlanError) as refusal:
        plan((50_000,), cluster, cost, PlannerConfig(), ["ring"])
    assert "one level" not in str(refusal.value)
