from __future__ import annotations

import pytest

from dist_attn.config import PlannerConfig
from dist_attn.planner.simulation import simulate
from dist_attn.planner.solve import plan
from dist_attn.planner.step_plan import plan_step

LENGTHS = [60000, 50000, 30000, *range(300, 9000, 60)]


@pytest.mark.parametrize("solve", [plan, plan_step])
def test_without_jitter_the_simulation_is_the_prediction(sixteen, solve):
    cluster, cost = sixteen
    found = solve(LENGTHS, cluster, cost, PlannerConfig())
    report = simulate(found, num_layers=8)
    assert report.seconds == pytest.approx(found.predicted_s)
    shares = (
        report.compute_share
        + report.communication_share
        + report.overhead_share
        + report.group_wait_share
        + report.idle_share
    )
    assert shares == pytest.approx(1.0)
    assert report.group_wait_share == pytest.approx(0.0, abs=1e-12)


def test_jitter_costs_waiting_in_groups(sixteen):
    cluster, cost = sixteen
    found = plan(LENGTHS, cluster, cost, PlannerConfig())
    calm, rough = simulate(found, 8, 0.02, seed=1), simulate(found, 8, 0.2, seed=1)
    assert found.predicted_s < calm.seconds < rough.seconds
    assert rough.group_wait_share > calm.group_wait_share > 0
    assert simulate(found, 8, 0.2, seed=1) == rough
    assert simulate(found, 8, 0.2, seed=2) != rough


def test_nonsense_is_refused(four):
    cluster, cost = four
    with pytest.raises(ValueError, match="jitter must be 0 or more"):
        simulate(plan([5], cluster, cost, PlannerConfig()), 8, -1.0)
