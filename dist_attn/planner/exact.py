"""Which documents each group of a plan takes, as a MILP by HiGHS, for small batches.

The search decides micro-batches and groups; here they are given. With the symbols of `program`:

minimise   sum over m of T_m
subject to
    sum over g of x_ig = 1                               every document once
    f_g + sum over i of s_gi x_ig <= T_m(g)              the slowest group sets the time
    sum over i of n_i x_ig <= Q_g                        memory
    x_ig in {0, 1}

HiGHS starts from the search's own assignment, so that nothing is lost where it finds no better one.
Its bound is not used: it was seen to be wrong. What its assignment costs is added up here.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from dist_attn.planner.cost import FloatArray
from dist_attn.planner.fluid import Groups, OpenGroup
from dist_attn.planner.program import Program

#: Variables at the most; beyond, the search's assignment stands.
MAX_BINARIES = 120
_MAX_NODES = 20
_INFINITY = highspy.kHighsInf


@dataclass(frozen=True)
class _Place:
    """A document that may go into a group."""

    column: int
    document: int
    group: int


def assign(program: Program, batches: list[Groups]) -> list[Groups] | None:
    """Look for a better assignment to the groups of a plan; None if there is none to be had.

    The work is limited by nodes of the tree, so that equal input gives an equal plan.
    """
    groups = [(m, g) for m, batch in enumerate(batches) for g in batch]
    places: list[_Place] = []
    for number, (_, group) in enumerate(groups):
        for document in np.flatnonzero(np.isfinite(program.seconds[group.cls])).tolist():
            places.append(_Place(len(batches) + len(places), document, number))
    if len(places) > MAX_BINARIES or len(groups) < 2:
        return None
    before = objective(program, batches)
    if before <= 0:
        return None
    values = _solve(program, [(m, g.cls) for m, g in groups], places, batches, before)
    if values is None:
        return None
    found: list[Groups] = [[] for _ in batches]
    for number, (batch, group) in enumerate(groups):
        chosen = [p.document for p in places if p.group == number and values[p.column] > 0.5]
        if chosen:
            seconds = float(program.seconds[group.cls, chosen].sum())
            tokens = int(program.lengths[chosen].sum())
            found[batch].append(OpenGroup(group.cls, seconds, tokens, chosen))
    found = [batch for batch in found if batch]
    better = objective(program, found) < before * (1 - 1e-9)
    return found if better and _feasible(program, found) else None


def _feasible(program: Program, batches: list[Groups]) -> bool:
    """Whether every document has one place and no group too many tokens, in whole numbers."""
    groups = [g for batch in batches for g in batch]
    documents = sorted(d for g in groups for d in g.documents)
    fits = all(g.tokens <= program.classes[g.cls].capacity_tokens for g in groups)
    return fits and documents == list(range(len(program.lengths)))


def objective(program: Program, batches: list[Groups]) -> float:
    """Seconds of a plan: the slowest group of each micro-batch."""
    return sum(
        max((program.classes[g.cls].fixed_s + g.seconds for g in b), default=0.0) for b in batches
    )


def _solve(
    program: Program,
    groups: list[tuple[int, int]],
    places: list[_Place],
    batches: list[Groups],
    scale: float,
) -> FloatArray | None:
    """Columns: seconds of each micro-batch, then the places. Seconds are scaled to one."""
    highs = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": 1e-4}
    options |= {"mip_max_nodes": _MAX_NODES, "mip_heuristic_effort": 0.0}
    for option, value in options.items():
        highs.setOptionValue(option, value)
    for _ in batches:
        highs.addVar(0.0, _INFINITY)
    for column in range(len(batches)):
        highs.changeColCost(column, 1.0)
    for place in places:
        highs.addVar(0.0, 1.0)
        highs.changeColIntegrality(place.column, highspy.HighsVarType.kInteger)
    for document in range(len(program.lengths)):
        _row(highs, 1.0, 1.0, {p.column: 1.0 for p in places if p.document == document})
    for number, (batch, cls) in enumerate(groups):
        kind = program.classes[cls]
        mine = [p for p in places if p.group == number]
        times = {p.column: float(program.seconds[cls, p.document]) / scale for p in mine}
        _row(highs, -_INFINITY, -kind.fixed_s / scale, {batch: -1.0, **times})
        full = float(kind.capacity_tokens)
        tokens = {p.column: float(program.lengths[p.document]) / full for p in mine}
        _row(highs, -_INFINITY, 1.0, tokens)
    flat = [set(g.documents) for batch in batches for g in batch]
    columns = np.array([p.column for p in places], dtype=np.int32)
    start = np.array([float(p.document in flat[p.group]) for p in places])
    highs.setSolution(len(columns), columns, start)
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.kSolutionStatusFeasible:
        return None
    return np.array(highs.getSolution().col_value)


def _row(highs: highspy.Highs, lower: float, upper: float, entries: dict[int, float]) -> None:
    columns = np.array(list(entries), dtype=np.int32)
    values = np.array(list(entries.values()), dtype=np.float64)
    highs.addRow(lower, upper, len(columns), columns, values)
