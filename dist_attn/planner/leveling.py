"""The shares of a micro-batch's documents on ranks that are given, as a linear program.

With documents i on ranks r of their block, x_ir tokens and y_ir seconds of document i on rank r,
whole documents that take w_r seconds and v_r tokens of rank r, and lines l of `uneven.Terms`:

minimise   T
subject to
    sum over r of x_ir = n_i                            all of every document
    y_ir >= base_l + slope_l x_ir / n_i                 its seconds, for every line
    w_r + sum over i of y_ir <= T                       the rank that ends last
    v_r + sum over i of x_ir <= Q_r                     memory
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.planner.costs import FloatArray, IntArray
from dist_attn.planner.highs import LinearProgram, WarmProgram
from dist_attn.planner.uneven import Terms


@dataclass(frozen=True)
class Sharing:
    """A document on its ranks, and what it costs there."""

    length: int
    ranks: tuple[int, ...]
    #: On each of the ranks.
    terms: tuple[Terms, ...]


def level(
    sharings: list[Sharing], work_s: FloatArray, tokens: IntArray, capacity: IntArray
) -> list[FloatArray] | None:
    """The fractions of every document on its ranks that let the last rank end soonest.

    Args:
        sharings: documents of several ranks.
        work_s: what every rank does beside them.
        tokens: what every rank holds beside them.
        capacity: what every rank can hold.

    Returns:
        One array per document; None where HiGHS comes to no end.
    """
    if not sharings:
        return []
    owner = np.concatenate([np.full(len(s.ranks), i) for i, s in enumerate(sharings)])
    rank = np.concatenate([np.array(s.ranks) for s in sharings])
    terms = [t for s in sharings for t in s.terms]
    lengths = np.array([s.length for s in sharings], dtype=np.float64)
    # Seconds and tokens are scaled to about one.
    second = float(work_s.max()) + max(t.attention_s + t.linear_s for t in terms)
    token = float(capacity.max())
    num, world = len(owner), len(work_s)
    fraction, seconds = np.arange(num), num + np.arange(num)
    end = 2 * num
    lines = [(c, base, slope) for c, t in enumerate(terms) for base, slope in t.lines()]
    column = np.array([c for c, _, _ in lines])
    base, slope = (np.array([x[k] for x in lines]) / second for k in (1, 2))
    # Rows: documents, lines, the ends of ranks, their tokens.
    first_line = len(sharings)
    first_end = first_line + len(lines)
    first_room = first_end + world
    line_rows = first_line + np.arange(len(lines))
    ends = first_end + np.arange(world)
    parts = [
        (owner, fraction, np.ones(num)),
        (line_rows, seconds[column], np.ones(len(lines))),
        (line_rows, fraction[column], -slope),
        (first_end + rank, seconds, np.ones(num)),
        (ends, np.full(world, end), -np.ones(world)),
        (first_room + rank, fraction, lengths[owner] / token),
    ]
    rows, columns, values = (np.concatenate([p[k] for p in parts]) for k in range(3))
    infinite = np.full(first_room + world, np.inf)
    lower, upper = -infinite, infinite.copy()
    lower[:first_line] = upper[:first_line] = 1.0
    lower[first_line:first_end] = base
    upper[first_end:first_room] = -work_s / second
    # A token less per document leaves room for rounding to whole tokens.
    held = np.bincount(rank, minlength=world)
    upper[first_room:] = (capacity - tokens - held) / token
    if (upper[first_room:] < 0).any():
        upper[first_room:] = (capacity - tokens) / token
    cost = np.zeros(end + 1)
    cost[end] = 1.0
    program = LinearProgram(cost, lower, upper, rows, columns, values)
    try:
        answer = WarmProgram(program).solve()
    except ArithmeticError:
        return None
    if answer is None:
        return None
    found = np.maximum(answer.values[:num], 0.0)
    return [found[owner == i] for i in range(len(sharings))]
