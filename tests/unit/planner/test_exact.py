"""Plans of small batches against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dist_attn.config import PlannerConfig
from dist_attn.planner import exact
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.exact import decide, objective
from dist_attn.planner.fluid import Groups, OpenGroup
from dist_attn.planner.program import Program, build_program
from dist_attn.planner.shape import ModelShape

SHAPE = ModelShape(64, 176, 2, 4, 2, 16, 257)


def program_of(lengths: list[int], cap: int = 2000) -> Program:
    cluster = local_cluster(4, ["cpu"] * 4, 4)
    cost = CostModel.derive(SHAPE, cluster, 2, cap)
    return build_program(lengths, cluster, cost, PlannerConfig(), ["ring"])


def groups_of(program: Program, classes: list[list[int]], choice: tuple[int, ...]) -> list[Groups]:
    """Groups of these classes, document i in group choice[i]."""
    flat = [(m, cls) for m, batch in enumerate(classes) for cls in batch]
    batches: list[Groups] = [[] for _ in classes]
    for number, (m, cls) in enumerate(flat):
        documents = [d for d, c in enumerate(choice) if c == number]
        seconds = float(program.seconds[cls, documents].sum())
        tokens = int(program.lengths[documents].sum())
        batches[m].append(OpenGroup(cls, seconds, tokens, documents))
    return batches


def fits(program: Program, batches: list[Groups]) -> bool:
    groups = [g for b in batches for g in b]
    return all(
        g.tokens <= program.classes[g.cls].capacity_tokens and np.isfinite(g.seconds)
        for g in groups
    )


def used(batches: list[Groups]) -> list[Groups]:
    """Without what holds no documents."""
    return [b for b in ([g for g in b if g.documents] for b in batches) if b]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_assignment_is_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_BINARIES", 0)  # the groups stay as they are
    rng = np.random.default_rng(seed)
    program = program_of(rng.integers(50, 1900, size=7).tolist(), cap=3500)
    degrees = [c.degree for c in program.classes]
    pair, single = degrees.index(2), degrees.index(1)
    classes = [[pair, single, single], [pair]]
    every = [
        batches
        for choice in itertools.product(range(4), repeat=7)
        if fits(program, batches := groups_of(program, classes, choice))
    ]
    best = min(objective(program, used(batches)) for batches in every)
    worst = max(every, key=lambda batches: objective(program, batches))
    found = decide(program, worst)
    assert found is not None
    assert fits(program, found)
    assert sorted(d for b in found for g in b for d in g.documents) == list(range(7))
    assert best <= objective(program, found) <= best * (1 + 2e-4)
    assert objective(program, worst) > best * 1.05
    # From the best there is nothing better to find.
    again = decide(program, found)
    assert again is None or objective(program, again) >= best


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_micro_batches_and_groups_are_decided_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = program_of(rng.integers(200, 3000, size=4).tolist(), cap=1600)
    of_degree = {c.degree: i for i, c in enumerate(program.classes)}
    slots = [of_degree[d] for d in (4, 2, 2, 1, 1, 1, 1)]
    every = []
    for choice in itertools.product(range(2 * len(slots)), repeat=4):
        batches = used(groups_of(program, [slots, slots], choice))
        devices = [sum(program.classes[g.cls].degree for g in b) for b in batches]
        if fits(program, batches) and max(devices) <= 4:
            every.append(batches)
    best = min(objective(program, batches) for batches in every)
    # Everything on all ranks, one document after another: another degree, another count.
    start = groups_of(program, [[of_degree[4]], [of_degree[4]]], (0, 0, 1, 1))
    assert fits(program, start)
    found = decide(program, start)
    assert found is not None
    assert fits(program, found)
    assert best <= objective(program, found) <= best * (1 + 2e-4)
    assert objective(program, start) > best * 1.02
    # The plan does not change from call to call.
    assert decide(program, start) == found


def test_large_batches_and_single_groups_are_left_alone() -> None:
    program = program_of([300] * 200, cap=10**6)
    cls = [c.degree for c in program.classes].index(2)
    choice = tuple(i % 2 for i in range(len(program.lengths)))
    assert decide(program, groups_of(program, [[cls, cls]], choice)) is None
