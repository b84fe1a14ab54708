from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_attn.config import PlannerConfig
from dist_attn.planner.cost import CostModel
from dist_attn.planner.exact import objective
from dist_attn.planner.fluid import Groups, OpenGroup
from dist_attn.planner.polish import Polish
from dist_attn.planner.program import Program, build_program
from tests.unit.planner.conftest import make_cluster, make_shape

CLUSTER = make_cluster((1, 4, "cpu"))
COST = CostModel.derive(make_shape(), CLUSTER, 2, 3000)


def _program(lengths: list[int]) -> Program:
    return build_program(lengths, CLUSTER, COST, PlannerConfig(), ["ring"])


def _dealt(program: Program, source: np.random.Generator) -> list[Groups]:
    """Every document alone or beside others, in groups of drawn classes with room."""
    batches: list[Groups] = []
    for i, length in enumerate(program.lengths.tolist()):
        groups = [g for batch in batches for g in batch]
        fitting = [g for g in groups if g.tokens + length <= program.classes[g.cls].capacity_tokens]
        if fitting and source.random() < 0.7:
            group = fitting[source.integers(len(fitting))]
        else:
            able = [c for c, k in enumerate(program.classes) if k.capacity_tokens >= length]
            group = OpenGroup(int(source.choice(able)), 0.0, 0)
            degree = program.classes[group.cls].degree
            free = [
                b for b in batches if sum(program.classes[g.cls].degree for g in b) + degree <= 4
            ]
            if free:
                free[0].append(group)
            else:
                batches.append([group])
        group.documents.append(i)
        group.tokens += length
        group.seconds += float(program.seconds[group.cls, i])
    return batches


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_exchanges_keep_plans_sound_and_never_slow_them(lengths, seed):
    program = _program(lengths)
    batches = _dealt(program, np.random.default_rng(seed))
    before = objective(program, batches)
    found = Polish(program, batches).run(100, math.inf)
    assert objective(program, found) <= before * (1 + 1e-12)
    groups = [g for batch in found for g in batch]
    assert sorted(d for g in groups for d in g.documents) == list(range(len(lengths)))
    for g in groups:
        assert g.tokens == program.lengths[g.documents].sum()
        assert g.tokens <= program.classes[g.cls].capacity_tokens
        assert g.seconds == pytest.approx(float(program.seconds[g.cls, g.documents].sum()))


def test_a_lopsided_plan_is_levelled():
    program = _program([1000, 900, 800, 700, 600, 500, 400, 300])
    alone = next(c for c, k in enumerate(program.classes) if k.degree == 1)
    row = program.seconds[alone]

    def group(documents: list[int]) -> OpenGroup:
        tokens = int(program.lengths[documents].sum())
        return OpenGroup(alone, float(row[documents].sum()), tokens, documents)

    batches = [[group([0, 1, 2]), group([3, 4]), group([5, 6]), group([7])]]
    found = Polish(program, batches).run(100, math.inf)
    fixed = program.classes[alone].fixed_s
    level = float(row.sum()) / 4
    assert objective(program, batches) - fixed > 1.9 * level
    assert objective(program, found) - fixed < 1.1 * level


def test_groups_use_multiples_of_what_divides_all_lengths():
    lengths = [640, 1280, 1920]
    padded = _program(lengths)
    exact = build_program(lengths, CLUSTER, COST, PlannerConfig(), ["ring"], whole_documents=False)
    for one, other in zip(padded.classes, exact.classes, strict=True):
        assert one.capacity_tokens == other.capacity_tokens // 640 * 640
        assert replace(one, capacity_tokens=other.capacity_tokens) == other
    assert any(c.capacity_tokens % 640 for c in exact.classes)
    # Classes in which nothing fits are left out.
    assert min(c.degree for c in _program([9000]).classes) == 4


def test_a_micro_batch_without_groups_is_left_out() -> None:
    program = _program([500] * 6)
    batches = _dealt(program, np.random.default_rng(1))
    want = Polish(program, batches).run(50, math.inf)
    # Where a micro-batch costs nothing the search may leave one empty.
    assert Polish(program, [*batches, []]).run(50, math.inf) == want
