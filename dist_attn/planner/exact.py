"""The program of small batches as a MILP by HiGHS: micro-batches, groups and documents at once.

Variables and constraints are those of `program`. A slot is a place for one group: a micro-batch, a
class, and a number among its equals. Slots are offered, in each micro-batch of the plan at hand,
for every class that is not worse than another of its degree in every respect; a micro-batch whose
slots all stay shut is saved. Of equal slots the first are opened first. After that, with the slots
that were opened and no others, the documents are assigned once more, which is a far smaller
program.

HiGHS starts from the plan that the search found, so that nothing is lost where it finds no better
one. Its bound is not used: it was seen to be wrong. What its plan costs is added up here.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np

from dist_attn.planner.costs import FloatArray
from dist_attn.planner.fluid import Groups, OpenGroup
from dist_attn.planner.program import Program

#: Binary variables at the most, of all slots and of those that are open; beyond, the plan stands.
MAX_BINARIES = 260
MAX_BINARIES_OPEN = 160
#: Nodes of the tree. A program of all slots is the larger one and takes longer over each.
_NODES = 20
_NODES_OPEN = 20
_INFINITY = highspy.kHighsInf


@dataclass(frozen=True)
class _Slot:
    """A place for one group of a class; `copy` counts the equal ones of a micro-batch."""

    batch: int
    cls: int
    copy: int


@dataclass(frozen=True)
class _Model:
    """The columns: seconds of each micro-batch, whether each slot is open, then the places."""

    num_batches: int
    slots: tuple[_Slot, ...]
    #: (document, slot) of each place.
    places: tuple[tuple[int, int], ...]

    def slot_column(self, slot: int) -> int:
        """Column that says whether a slot is open."""
        return self.num_batches + slot

    @property
    def first_place(self) -> int:
        """Column of the first place."""
        return self.num_batches + len(self.slots)

    @property
    def num_binaries(self) -> int:
        """Columns that are 0 or 1."""
        return len(self.slots) + len(self.places)


def decide(program: Program, batches: list[Groups]) -> list[Groups] | None:
    """Look for a better plan than the one at hand by MILP; None if there is none to be had.

    The work is limited by nodes of the tree, so that equal input gives an equal plan. Large
    batches are left alone. In clusters of several kinds of devices, and where groups may fail to
    find room in a node, the groups stay as they are.
    """
    best = batches
    if len(program.nodes) == 1 and not program.tight_nodes:
        best = _improved(program, best, _undominated(program), MAX_BINARIES, _NODES)
    best = _improved(program, best, set(), MAX_BINARIES_OPEN, _NODES_OPEN)
    return None if best is batches else best


def _improved(
    program: Program, batches: list[Groups], offered: set[int], max_binaries: int, nodes: int
) -> list[Groups]:
    """Solve with slots for the classes offered and the plan's own groups; the better plan."""
    before = objective(program, batches)
    # Every document fits somewhere: a program of so many is too large without looking closer.
    if before <= 0 or len(program.lengths) > max_binaries:
        return batches
    model = _model(program, batches, offered)
    if not 0 < model.num_binaries <= max_binaries:
        return batches
    values = _solve(program, model, batches, before, nodes)
    if values is None:
        return batches
    found: list[Groups] = [[] for _ in batches]
    for number, slot in enumerate(model.slots):
        chosen = [
            document
            for column, (document, of) in enumerate(model.places, model.first_place)
            if of == number and values[column] > 0.5
        ]
        if chosen:
            seconds = float(program.seconds[slot.cls, chosen].sum())
            tokens = int(program.lengths[chosen].sum())
            found[slot.batch].append(OpenGroup(slot.cls, seconds, tokens, chosen))
    found = [batch for batch in found if batch]
    better = objective(program, found) < before * (1 - 1e-9)
    return found if better and _feasible(program, found) else batches


def objective(program: Program, batches: list[Groups]) -> float:
    """Seconds of a plan: the slowest group of each micro-batch."""
    return sum(
        max((program.classes[g.cls].fixed_s + g.seconds for g in b), default=0.0) for b in batches
    )


def _feasible(program: Program, batches: list[Groups]) -> bool:
    """Whether memory, devices and documents are right, in whole numbers."""
    groups = [g for batch in batches for g in batch]
    documents = sorted(d for g in groups for d in g.documents)
    fits = all(g.tokens <= program.classes[g.cls].capacity_tokens for g in groups)
    devices = [sum(program.classes[g.cls].degree for g in batch) for batch in batches]
    return (
        fits
        and all(count <= program.num_devices for count in devices)
        and documents == list(range(len(program.lengths)))
    )


def _model(program: Program, batches: list[Groups], offered: set[int]) -> _Model:
    """Slots for the classes offered and for those of the plan at hand; places in them."""
    slots = []
    for m, batch in enumerate(batches):
        used = [g.cls for g in batch]
        for cls, kind in enumerate(program.classes):
            copies = program.num_devices // kind.degree if cls in offered else used.count(cls)
            slots += [_Slot(m, cls, k) for k in range(copies)]
    places = tuple(
        (document, number)
        for number, slot in enumerate(slots)
        for document in np.flatnonzero(np.isfinite(program.seconds[slot.cls])).tolist()
    )
    return _Model(len(batches), tuple(slots), places)


def _undominated(program: Program) -> set[int]:
    """Classes that no other of their degree equals or beats in time and memory."""
    kept: list[int] = []
    for cls, kind in enumerate(program.classes):
        beaten = False
        for other, rival in enumerate(program.classes):
            if other == cls or rival.degree != kind.degree:
                continue
            no_worse = (
                rival.fixed_s <= kind.fixed_s
                and rival.capacity_tokens >= kind.capacity_tokens
                and bool((program.seconds[other] <= program.seconds[cls]).all())
            )
            beaten |= no_worse and (other in kept or other > cls)
        if not beaten:
            kept.append(cls)
    return set(kept)


def _solve(
    program: Program, model: _Model, batches: list[Groups], scale: float, nodes: int
) -> FloatArray | None:
    """Solve from the plan at hand; seconds are scaled to one."""
    highs = highspy.Highs()
    options = {"output_flag": False, "threads": 1, "random_seed": 0, "mip_rel_gap": 1e-4}
    options |= {"mip_max_nodes": nodes, "mip_heuristic_effort": 0.0}
    # Strong branching costs more than the nodes that it saves.
    options |= {"mip_pscost_minreliable": 0}
    for option, value in options.items():
        highs.setOptionValue(option, value)
    for column in range(model.num_batches):
        highs.addVar(0.0, _INFINITY)
        highs.changeColCost(column, 1.0)
    for column in range(model.num_batches, model.num_batches + model.num_binaries):
        highs.addVar(0.0, 1.0)
        highs.changeColIntegrality(column, highspy.HighsVarType.kInteger)
    _add_rows(highs, program, model, scale)
    start = highspy.HighsSolution()
    start.col_value = _start(program, model, batches, scale)
    highs.setSolution(start)
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.kSolutionStatusFeasible:
        return None
    return np.array(highs.getSolution().col_value)


def _add_rows(highs: highspy.Highs, program: Program, model: _Model, scale: float) -> None:
    columns_of: list[list[tuple[int, int]]] = [[] for _ in model.slots]
    places_of: list[dict[int, float]] = [{} for _ in program.lengths]
    for column, (document, of) in enumerate(model.places, model.first_place):
        columns_of[of].append((column, document))
        places_of[document][column] = 1.0
    for places in places_of:
        _row(highs, 1.0, 1.0, places)
    devices: list[dict[int, float]] = [{} for _ in range(model.num_batches)]
    for number, slot in enumerate(model.slots):
        kind = program.classes[slot.cls]
        is_open = model.slot_column(number)
        seconds = program.seconds[slot.cls]
        times = {c: float(seconds[d]) / scale for c, d in columns_of[number]}
        _row(highs, -_INFINITY, 0.0, {slot.batch: -1.0, is_open: kind.fixed_s / scale, **times})
        full = float(kind.capacity_tokens)
        tokens = {c: float(program.lengths[d]) / full for c, d in columns_of[number]}
        _row(highs, -_INFINITY, 0.0, {is_open: -1.0, **tokens})
        devices[slot.batch][is_open] = float(kind.degree)
        if slot.copy:
            _row(highs, -_INFINITY, 0.0, {is_open: 1.0, is_open - 1: -1.0})
    for row in devices:
        _row(highs, -_INFINITY, float(program.num_devices), row)


def _start(program: Program, model: _Model, batches: list[Groups], scale: float) -> list[float]:
    """Values of all columns for the plan at hand."""
    number_of = {slot: number for number, slot in enumerate(model.slots)}
    group_of: dict[int, set[int]] = {}
    for m, batch in enumerate(batches):
        seen: dict[int, int] = {}
        for group in batch:
            copy = seen.get(group.cls, 0)
            seen[group.cls] = copy + 1
            group_of[number_of[_Slot(m, group.cls, copy)]] = set(group.documents)
    opened = [float(number in group_of) for number in range(len(model.slots))]
    placed = [float(document in group_of.get(slot, ())) for document, slot in model.places]
    return [objective(program, [batch]) / scale for batch in batches] + opened + placed


def _row(highs: highspy.Highs, lower: float, upper: float, entries: dict[int, float]) -> None:
    columns = np.array(list(entries), dtype=np.int32)
    values = np.array(list(entries.values()), dtype=np.float64)
    highs.addRow(lower, upper, len(columns), columns, values)
