"""The program relaxed over length classes and time classes: a proven lower bound.

Documents of nearly one length form a length class k; micro-batches whose time lies in an interval
(tau_t, tau_t+1] form a time class t; group classes c whose short documents cost about the same form
a tier q. With D devices in all:

    count_t     micro-batches of time class t
    total_t     their seconds together
    part_qt     devices that groups of tier q have in them, as a share of D
    share_kct   share of length class k that lies in groups of class c in time class t

minimise  sum over t of total_t  subject to

    sum over c, t of share_kct = 1                                       every length class
    sum over k, c of d_c s_kc share_kct / D <= total_t - f count_t       device seconds
    sum over q of part_qt <= count_t                                     devices
    sum over k, c in q of (memory, slots or seconds)_kct share_kct <= part_qt    within each tier
    total_t - tau_t count_t >= sum over c of (need_kc - tau_t) share_kct   each of the longest
    part_qt >= sum over c in q of d_c / D share_kct                        each of the longest
    tau_t count_t <= total_t <= tau_t+1 count_t
    sum over t that can hold the longest document of count_t >= 1

A slot is a whole group: a document that fills more than half of a group's memory or time cannot
share it with its like. Its memory counts in full where the time it leaves does not let others use
the rest. Every plan satisfies these with its own shares, so the optimum bounds every plan from
below, provided s_kc is the least seconds per token in its length class. Branching on the counts
(their sums from the longest class on are integers) and on the places of the longest documents
tightens it; every node is a linear program, whose optimum is trusted, where an integer solver's
bound would not be.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from dist_attn.planner.highs import Answer, WarmProgram
from dist_attn.planner.program import Program
from dist_attn.planner.relaxation import Relaxation, build_relaxation

#: Columns of a linear program up to which all nodes that are allowed are solved.
_COLUMNS = 700


@dataclass(frozen=True)
class Bound:
    """A lower bound, the linear programs it took, and whether the clock cut it."""

    value_s: float
    programs: int
    late: bool


@dataclass(frozen=True)
class _Node:
    """Limits of the counts' sums and columns that are shut."""

    at_least: tuple[float, ...]
    at_most: tuple[float, ...]
    shut: frozenset[int]


def lower_bound(
    program: Program,
    predicted_s: float,
    times: Sequence[float],
    max_nodes: int,
    deadline: float,
    enough: float = 1e-3,
) -> Bound:
    """Bound every plan from below.

    Args:
        program: the program.
        predicted_s: what a plan takes; the search ends when the bound comes within `enough` of it.
        times: that plan's micro-batches, at which time classes are cut.
        max_nodes: linear programs to solve; fewer where they have many columns.
        deadline: `time.monotonic()` at which to stop.
        enough: a relative gap that is good enough.
    """
    relaxation = build_relaxation(program, times, predicted_s)
    solver = WarmProgram(relaxation.linear)
    # A node takes about as long as the program is large.
    max_nodes = math.ceil(max_nodes * min(1.0, _COLUMNS / len(relaxation.linear.cost)))
    target = predicted_s / relaxation.scale_s * (1 - enough)
    many = relaxation.num_times
    root = _Node((0.0,) * many, (math.inf,) * many, frozenset())
    solved, late = 1, False
    value = 0.0
    try:
        answer = _solve(solver, relaxation, root, None)
        assert answer is not None, "the relaxation holds the plan at hand"
        queue = [(answer.objective, 0, root, answer)]
        while queue:
            value = queue[0][0]
            late = time.monotonic() > deadline
            if value >= target or solved >= max_nodes or late:
                break
            _, _, node, parent = queue[0]
            children = _branch(relaxation, node, parent.values)
            if not children:
                break
            answers = [_solve(solver, relaxation, child, parent.basis) for child in children]
            heapq.heappop(queue)
            for child, answer in zip(children, answers, strict=True):
                solved += 1
                if answer is not None:
                    heapq.heappush(queue, (answer.objective, solved, child, answer))
        else:
            # Every node was refuted: no plan lies below the one at hand.
            value = target
    except ArithmeticError:
        # What is proven so far stands.
        pass
    # Optima hold to HiGHS's feasibility tolerance of 1e-7 per row.
    return Bound(value * relaxation.scale_s * (1 - 1e-5), solved, late)


def _solve(
    solver: WarmProgram, relaxation: Relaxation, node: _Node, basis: highspy.HighsBasis | None
) -> Answer | None:
    first = relaxation.first_sum_row
    rows = range(first, first + relaxation.num_times)
    solver.limit_rows(rows, node.at_least, node.at_most)
    solver.shut_columns(node.shut)
    return solver.solve(basis)


def _branch(relaxation: Relaxation, node: _Node, solution: np.ndarray) -> list[_Node]:
    """Two nodes that exclude this solution, or none when nothing is fractional."""
    many = relaxation.num_times
    sums = np.cumsum(solution[:many][::-1])[::-1]
    fraction = np.abs(sums - np.round(sums))
    if fraction.max() > 1e-5:
        t = 0 if fraction[0] > 1e-5 else int(np.argmax(fraction))
        return [_split(node, t, float(np.floor(sums[t])), up) for up in (False, True)]
    for columns in relaxation.long_columns:
        shares = solution[columns]
        if shares.max() < 1 - 1e-4:
            inside = _half(relaxation, columns, shares)
            return [
                _Node(node.at_least, node.at_most, node.shut | frozenset(part.tolist()))
                for part in (columns[inside], columns[~inside])
            ]
    return []


def _split(node: _Node, t: int, whole: float, up: bool) -> _Node:
    """At most `whole`, or at least one more, micro-batches from time class t on."""
    at_least, at_most = list(node.at_least), list(node.at_most)
    if up:
        at_least[: t + 1] = [max(a, whole + 1) for a in at_least[: t + 1]]
    else:
        at_most[t:] = [min(a, whole) for a in at_most[t:]]
    return _Node(tuple(at_least), tuple(at_most), node.shut)


def _half(relaxation: Relaxation, columns: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Split one document's columns by time where it lies in several, else by group class."""
    times = relaxation.time_class[columns - relaxation.first_share]
    by_time = np.bincount(times, weights=shares, minlength=relaxation.num_times)
    if by_time.max() < 1 - 1e-4:
        later = np.cumsum(by_time[::-1])[::-1]
        open_at = np.flatnonzero((later > 1e-4) & (later < 1 - 1e-4))
        return times >= open_at[np.argmin(np.abs(later[open_at] - 0.5))]
    classes = relaxation.group_class[columns - relaxation.first_share]
    return classes == classes[np.argmax(shares)]
