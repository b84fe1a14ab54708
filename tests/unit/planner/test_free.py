from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.check import check_plan
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.figure import figure
from dist_attn.planner.free import plan_free
from dist_attn.planner.leveling import Sharing, level
from dist_attn.planner.page import page
from dist_attn.planner.plan import Plan
from dist_attn.planner.schedule import busy_share, spans
from dist_attn.planner.simulation import simulate
from dist_attn.planner.solve import plan
from dist_attn.planner.uneven import Team, Terms, rank_seconds, terms
from tests.unit.planner.conftest import make_cluster, make_shape

CLUSTERS = [((1, 3, "cpu"),), ((2, 4, "h100-80gb"),), ((1, 4, "h100-80gb"), (1, 4, "a100-40gb"))]
RULES = PlannerConfig(time_limit_s=60.0)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    nodes=st.sampled_from(CLUSTERS),
    strategies=st.sampled_from([["ring"], ["ring", "ulysses"], ["gather"], ["gather", "ulysses"]]),
)
def test_free_plans_are_sound(lengths, nodes, strategies):
    cluster = make_cluster(*nodes)
    cost = CostModel.derive(make_shape(), cluster, 2, 3000)
    found = plan_free(lengths, cluster, cost, RULES, strategies)
    check_plan(found, lengths, cluster, cost)
    assert 0 <= found.lower_bound_s <= found.predicted_s
    assert Plan.from_json(found.to_json()) == found
    assert found.placement == "free"


@pytest.fixture(scope="module")
def batch():
    """Ring and Ulysses on two nodes of 8 H100 with a heavy tail, and its plan."""
    cluster = make_cluster((2, 8, "h100-80gb"))
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_layers": 8, "num_heads": 16}
    shape = make_shape(**sizes, num_kv_heads=4, head_dim=64, bytes_per_element=2)
    cost = CostModel.derive(shape, cluster, 3, 8192)
    lengths = [60000, 50000, 30000, *range(300, 9000, 100)]
    return lengths, cluster, cost, plan_free(lengths, cluster, cost, RULES)


def test_short_documents_are_whole_and_ranks_level(batch):
    lengths, cluster, cost, found = batch
    groups = [g for m in found.micro_batches for g in m.groups]
    whole = [d for g in groups if g.degree == 1 for d in g.documents]
    assert sum(lengths[d] < 3000 for d in whole) > 8
    assert all(g.communication_s == 0 for g in groups if g.degree == 1)
    several = [
        m
        for m in found.micro_batches
        if len(m.seconds_of_ranks()) < sum(g.degree for g in m.groups)
    ]
    assert several, "ranks work in several groups"
    assert busy_share(found) > 0.95
    even = plan(lengths, cluster, cost, RULES)
    assert found.predicted_s < even.predicted_s
    assert found.digest() != even.digest()


def test_the_order_of_the_lengths_does_not_matter(batch):
    lengths, cluster, cost, found = batch
    other = plan_free(lengths[::-1], cluster, cost, RULES)
    assert other.predicted_s == pytest.approx(found.predicted_s, rel=1e-9)
    again = plan_free(lengths, cluster, cost, RULES)
    assert again.digest() == found.digest()


def test_a_time_limit_is_honoured_and_said(sixteen):
    cluster, cost = sixteen
    lengths = [60000, 50000, 30000, *range(300, 9000, 100)]
    hurried = plan_free(lengths, cluster, cost, PlannerConfig(time_limit_s=0.001))
    check_plan(hurried, lengths, cluster, cost)
    assert hurried.solver.time_limit_reached


def test_limited_degrees_find_a_plan(four):
    """Memory full to the last token but one, in groups of two at the most."""
    cluster, cost = four
    lengths = [2048 + 1500, 548, 1700, 1700, 347, 348]
    found = plan_free(lengths, cluster, cost, RULES.model_copy(update={"max_degree": 2}))
    check_plan(found, lengths, cluster, cost)


def first_shared(found):
    m, g = next(
        (m, g)
        for m, micro_batch in enumerate(found.micro_batches)
        for g, group in enumerate(micro_batch.groups)
        if group.degree > 1
    )
    return m, g, found.micro_batches[m].groups[g]


def with_group(found, m, g, **changes):
    micro_batch = found.micro_batches[m]
    groups = list(micro_batch.groups)
    groups[g] = dataclasses.replace(groups[g], **changes)
    batches = list(found.micro_batches)
    batches[m] = dataclasses.replace(micro_batch, groups=tuple(groups))
    return dataclasses.replace(found, micro_batches=tuple(batches))


def test_the_check_finds_what_is_wrong(batch):
    lengths, cluster, cost, found = batch
    check_plan(found, lengths, cluster, cost)
    m, g, group = first_shared(found)
    moved = list(group.shares[0])
    moved[0], moved[-1] = moved[0] + 7, moved[-1] - 7
    wrong = {
        "ranks take": with_group(found, m, g, shares=(tuple(moved), *group.shares[1:])),
        "add up": with_group(
            found, m, g, shares=((group.shares[0][0] + 1, *group.shares[0][1:]), *group.shares[1:])
        ),
        "predicts": dataclasses.replace(found, predicted_s=found.predicted_s * 0.99),
        "strategy": with_group(found, m, g, strategy="local"),
    }
    for words, plan_ in wrong.items():
        with pytest.raises(PlanError, match=words):
            check_plan(plan_, lengths, cluster, cost)
    small = dataclasses.replace(
        cost, devices=tuple(dataclasses.replace(d, max_tokens=4000) for d in cost.devices)
    )
    with pytest.raises(PlanError, match="more than 4000"):
        check_plan(found, lengths, cluster, small)


@pytest.mark.parametrize(
    "changes", [{"shares": ()}, {"rank_s": (0.0,)}, {"ranks": (0, 0)}, {"documents": ()}]
)
def test_validate_refuses_damaged_shares(batch, changes):
    m, g, _ = first_shared(batch[3])
    with pytest.raises(PlanError, match="make the plan again"):
        with_group(batch[3], m, g, **changes).validate()


def test_shares_need_free_placement(batch):
    with pytest.raises(PlanError, match="make the plan again"):
        dataclasses.replace(batch[3], placement="groups").validate()


def test_even_shares_cost_what_a_group_costs(sixteen):
    cluster, cost = sixteen
    lengths = np.array([64000, 8000])
    for strategy, ranks in itertools.product(("ring", "ulysses", "gather"), ((0, 1), range(16))):
        team = Team.of(tuple(ranks), strategy, cluster)
        shares = np.tile(lengths[:, None] // len(team.pools), (1, len(team.pools)))
        compute, communication = rank_seconds(cost, team, lengths, shares)
        assert compute == pytest.approx(cost.compute_s(team.kind, lengths).sum())
        expected = cost.communication_s(team.kind, lengths).sum()
        assert communication == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
    strategy=st.sampled_from(["ring", "ulysses", "gather"]),
    exchange=st.floats(0, 3),
    overlap=st.floats(0, 1),
)
def test_uneven_shares_never_cost_less_in_all(parts, strategy, exchange, overlap):
    """What the bounds rely on; and the lines and their inverse are those of the seconds."""
    term = Terms(4, strategy, 1.0, 2.0, exchange, 0.0 if strategy == "ulysses" else overlap)
    fractions = np.array(parts) / sum(parts)
    work, excess = term.seconds(fractions)
    even = sum(x.sum() for x in term.seconds(np.full(4, 0.25)))
    if np.count_nonzero(fractions) > 1:
        assert work.sum() + excess.sum() >= even * (1 - 1e-9)
    seconds = work + excess
    lines = np.max([base + slope * fractions for base, slope in term.lines()], axis=0)
    inside = fractions > 0
    assert lines[inside] == pytest.approx(seconds[inside])
    assert (term.most(seconds)[inside] >= fractions[inside] * (1 - 1e-9)).all()


def test_levelling_fills_unequal_ranks(four):
    """One document over two ranks of which one is busy already; and over one without room."""
    _, cost = four
    term = terms(cost, GroupKind(2, "gather"), np.array([1000]))[0]
    term = dataclasses.replace(term, exchange_s=0.0)
    whole = (term.linear_s + term.attention_s) * 2
    sharing = Sharing(1000, (0, 1), (term, term))
    room = np.array([2000, 2000])
    none = np.zeros(2, dtype=np.int64)
    found = level([sharing], np.array([0.5 * whole, 0.0]), none, room)
    assert found[0] == pytest.approx([0.25, 0.75], rel=1e-6)
    found = level([sharing], np.zeros(2), none, np.array([2000, 301]))
    assert found[0] == pytest.approx([0.7, 0.3], rel=1e-6)


def test_mixed_devices_share_by_speed():
    """In a group of H100 and A100 every rank gets what it does in the same time."""
    cluster = make_cluster((1, 1, "h100-80gb"), (1, 1, "a100-40gb"), overhead_s=0.0)
    shape = make_shape(hidden_size=1024, intermediate_size=4096, head_dim=64, num_heads=16)
    cost = CostModel.derive(shape, cluster, 3, 20000)
    found = plan_free([20000] * 2 + [40000], cluster, cost, RULES, ["gather"])
    even = plan([20000] * 2 + [40000], cluster, cost, RULES, ["gather"])
    check_plan(found, found.lengths, cluster, cost)
    assert found.predicted_s < 0.95 * even.predicted_s


def test_pictures_and_simulation(batch):
    found = batch[3]
    drawn = sum(1 for _ in spans(found))
    assert page(found).count('class="g"') == drawn
    assert figure(found).axes[0].get_xlim()[1] == pytest.approx(found.predicted_s)
    quiet, noisy = simulate(found, 8), simulate(found, 8, jitter=0.2, seed=1)
    assert found.predicted_s * (1 - 1e-9) <= quiet.seconds < 1.15 * found.predicted_s
    assert noisy.seconds > quiet.seconds
    shares = [getattr(noisy, f.name) for f in dataclasses.fields(noisy) if "share" in f.name]
    assert sum(shares) == pytest.approx(1.0)
