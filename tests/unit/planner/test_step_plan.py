from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_attn.config import PlannerConfig
from dist_attn.errors import PlanError
from dist_attn.planner.baselines import dynamic_plan
from dist_attn.planner.check import check_plan
from dist_attn.planner.cost import CostModel
from dist_attn.planner.figure import figure
from dist_attn.planner.page import page
from dist_attn.planner.plan import Plan
from dist_attn.planner.schedule import group_starts, step_time
from dist_attn.planner.solve import plan
from dist_attn.planner.step_plan import plan_step
from tests.unit.planner.conftest import make_cluster, make_shape

CLUSTERS = [((1, 3, "cpu"),), ((2, 4, "h100-80gb"),), ((1, 4, "h100-80gb"), (1, 4, "a100-40gb"))]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    nodes=st.sampled_from(CLUSTERS),
)
def test_step_plans_are_sound_and_no_slower_than_with_waits(lengths, nodes):
    cluster = make_cluster(*nodes)
    cost = CostModel.derive(make_shape(), cluster, 2, 3000)
    rules = PlannerConfig(time_limit_s=60.0)
    found = plan_step(lengths, cluster, cost, rules)
    check_plan(found, lengths, cluster, cost)
    assert 0 <= found.lower_bound_s <= found.predicted_s
    assert Plan.from_json(found.to_json()) == found


def test_ranks_run_on_without_waiting(sixteen):
    cluster, cost = sixteen
    lengths = [60000, 50000, 30000, *range(300, 9000, 60)]
    waiting = plan(lengths, cluster, cost, PlannerConfig())
    running = plan_step(lengths, cluster, cost, PlannerConfig())
    assert running.synchronisation == "step"
    assert running.predicted_s < waiting.predicted_s
    assert running.digest() != waiting.digest()
    # Taking the waits out of the same plan never slows it.
    freed = dataclasses.replace(waiting, synchronisation="step")
    assert step_time(freed) <= waiting.predicted_s * (1 + 1e-12)
    starts = group_starts(running)
    assert len({s for row in starts for s in row}) > len(starts)


def test_a_step_plan_with_a_false_time_is_found(four):
    cluster, cost = four
    lengths = [5000, 100, 2000, 2000]
    found = plan_step(lengths, cluster, cost, PlannerConfig())
    check_plan(found, lengths, cluster, cost)
    wrong = dataclasses.replace(found, predicted_s=found.predicted_s * 0.99)
    with pytest.raises(PlanError, match="predicts"):
        check_plan(wrong, lengths, cluster, cost)


def test_step_plans_are_drawn(four):
    cluster, cost = four
    found = plan_step([5000, 100, 2000, 2000], cluster, cost, PlannerConfig())
    assert figure(found).axes[0].get_xlim()[1] == pytest.approx(found.predicted_s)
    assert page(found).count('class="g"') >= 1


def test_the_greedy_baseline_is_sound_and_no_better(sixteen):
    cluster, cost = sixteen
    lengths = [60000, 50000, 30000, *range(300, 9000, 60)]
    greedy = dynamic_plan(lengths, cluster, cost, PlannerConfig())
    check_plan(greedy, lengths, cluster, cost)
    assert plan(lengths, cluster, cost, PlannerConfig()).predicted_s < greedy.predicted_s
