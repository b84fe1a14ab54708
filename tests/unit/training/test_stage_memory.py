"""What a run says before a stage's first step about groups beside a rank's largest."""

from __future__ import annotations

from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.training.stages import _tokens_of_further_groups


def plan_of(*micro_batches: list[tuple[tuple[int, ...], int]]) -> Plan:
    made = tuple(
        MicroBatch(
            tuple(Group(ranks, "ring", (), tokens, 0.0, 0.0, 0.0, 0) for ranks, tokens in groups)
        )
        for groups in micro_batches
    )
    return Plan((1,), 4, made, 1.0, 1.0, SolverReport("test"), "", "")


def test_each_group_of_a_rank_has_slots_as_large_as_it_ever_needs() -> None:
    plan = plan_of(
        [((0, 1, 2, 3), 400)],
        [((0, 1), 60), ((2,), 90), ((3,), 90)],
        [((0, 1), 40), ((2, 3), 31)],
    )
    # Rank 0: 100 tokens among four, and 30, not 20, among two.
    assert [_tokens_of_further_groups(plan, rank) for rank in range(4)] == [30, 30, 16, 16]
    assert _tokens_of_further_groups(plan_of([((0, 1), 60)]), 0) == 0
