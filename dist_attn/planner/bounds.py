"""The program relaxed over length classes and time classes: a lower bound, and times to aim at.

Documents of nearly one length form a length class k; micro-batches whose time lies in one interval
(tau_t, tau_t+1] form a time class t. With c running over group classes:

    count_t          micro-batches of time class t
    total_t          seconds of them together
    share_kct        share of length class k that lies in groups of class c in time class t

minimise  sum over t of total_t  subject to, per pool p and over all devices together,

    sum over c, t of share_kct = 1                                             every length class
    sum over k, c of d_c s_kc share_kct <= D_p (total_t - f count_t)           device time
    sum over k, c of d_c n_k / Q_c share_kct <= D_p count_t                    memory, in devices
    sum over k, c of d_c [k cannot share a c with its like] share_kct <= D_p count_t      slots
    sum over t that can hold k of count_t >= 1                                 longest documents
    tau_t count_t <= total_t <= tau_t+1 count_t

Every plan satisfies these with its own shares, so the optimum bounds every plan from below, provided
s_kc is the least seconds per token in the class and a class may use c in t as soon as one of its
documents can. Integer counts tighten it, and are the times that packing starts from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_attn.planner.cost import FloatArray, IntArray
from dist_attn.planner.highs import LinearProgram, Solution, solve_linear_program
from dist_attn.planner.program import Program


@dataclass(frozen=True)
class Relaxation:
    """The outcome: a proven bound, and micro-batch times to aim at, longest first."""

    lower_bound_s: float
    times: tuple[float, ...]
    programs: int


@dataclass(frozen=True)
class _Table:
    """One entry per (length class, group class, time class) that may be used."""

    length_class: IntArray
    group_class: IntArray
    time_class: IntArray
    device_s: FloatArray
    devices: FloatArray
    slots: FloatArray


def relax(program: Program, num_time_classes: int = 12) -> Relaxation:
    """Solve the relaxation with continuous counts for the bound and with integers for the times."""
    taus = _time_classes(program, num_time_classes)
    starts = _length_classes(program)
    table = _table(program, taus, starts)
    scale = float(program.seconds.min(axis=0).max()) + min(c.fixed_s for c in program.classes)
    scale = scale or 1.0
    linear = _linear_program(program, table, taus, len(starts), scale)
    continuous = solve_linear_program(linear)
    assert continuous is not None, "the relaxation holds every plan, and one exists without limits"
    num_times = len(taus) - 1
    linear.integer = np.zeros(len(linear.cost), dtype=bool)
    linear.integer[:num_times] = True
    whole = solve_linear_program(linear) or continuous
    return Relaxation(
        # LP optima hold to HiGHS's tolerances of 1e-7.
        lower_bound_s=continuous.objective * scale * (1 - 1e-6),
        times=_times(whole, num_times, scale),
        programs=2,
    )


def _times(solution: Solution, num_times: int, scale: float) -> tuple[float, ...]:
    times: list[float] = []
    for count, total in zip(
        solution.values[:num_times], solution.values[num_times : 2 * num_times], strict=True
    ):
        whole = int(np.ceil(count - 1e-3))
        times += [float(total) * scale / max(whole, 1)] * whole
    return tuple(sorted(times, reverse=True)) or (float(solution.objective) * scale,)


def _time_classes(program: Program, count: int) -> FloatArray:
    """Boundaries of the time classes, from nothing to no limit."""
    fixed = np.array([c.fixed_s for c in program.classes])[:, None]
    quickest = (program.seconds + fixed).min(axis=0)
    work = program.seconds * np.array([c.degree for c in program.classes])[:, None]
    frugal = np.argmin(work, axis=0)
    cheapest = (program.seconds + fixed)[frugal, np.arange(len(program.lengths))]
    low, high = float(np.median(quickest)), float(cheapest.max())
    # The fullest rank of the shortest documents also tells where times lie.
    full = program.seconds.sum(axis=1) / max(program.lengths.sum(), 1)
    memory = np.array([c.capacity_tokens for c in program.classes])
    usual = float(np.nanmin(np.where(np.isfinite(full), full * memory, np.nan), initial=high))
    low = max(min(low, usual * 0.5), high * 1e-3, 1e-9)
    high = max(high, usual, low * 1.01)
    return np.concatenate([[0.0], np.geomspace(low, high * (1 + 1e-9), count), [np.inf]])


def _length_classes(program: Program, tolerance: float = 0.01) -> IntArray:
    """Where each length class starts: work per token within it differs by at most `tolerance`."""
    degrees = np.array([c.degree for c in program.classes])[:, None]
    lengths = np.maximum(program.lengths, 1)
    per_token = (program.seconds * degrees).min(axis=0) / lengths
    fits = np.isfinite(program.seconds).sum(axis=0)
    starts = [0]
    for i in range(1, len(lengths)):
        first = starts[-1]
        near = per_token[i] >= per_token[first] * (1 - tolerance)
        if not near or fits[i] != fits[first] or (lengths[first] > 2 * lengths[i]):
            starts.append(i)
    return np.array(starts)


def _table(program: Program, taus: FloatArray, starts: IntArray) -> _Table:
    degrees = np.array([c.degree for c in program.classes], dtype=np.float64)
    fixed = np.array([c.fixed_s for c in program.classes])
    capacity = np.array([c.capacity_tokens for c in program.classes], dtype=np.float64)
    tokens = np.add.reduceat(program.lengths, starts).astype(np.float64)
    ends = np.append(starts[1:], len(program.lengths))
    shortest = np.maximum(program.lengths[ends - 1], 1).astype(np.float64)
    # Empty documents cost nothing and must not lend their price to the others of their class.
    per_token = np.where(program.lengths > 0, program.seconds, np.inf)
    per_token = per_token / np.maximum(program.lengths, 1)
    least_per_token = np.minimum.reduceat(per_token, starts, axis=1)
    least_s = np.minimum.reduceat(program.seconds, starts, axis=1)
    counts = (ends - starts).astype(np.float64)
    device_s = (
        np.where(np.isfinite(least_per_token), least_per_token, 0) * tokens * degrees[:, None]
    )
    devices = tokens[None, :] * (degrees / capacity)[:, None]
    columns = []
    for t in range(len(taus) - 1):
        spare = taus[t + 1] - fixed
        usable = np.isfinite(least_s) & (least_s <= spare[:, None])
        alone = (2 * shortest[None, :] > capacity[:, None]) | (2 * least_s > spare[:, None])
        slots = np.where(alone, counts[None, :] * degrees[:, None], 0.0)
        usable &= ~_dominated(program, device_s, devices, slots, usable)
        c, k = np.nonzero(usable)
        columns.append((k, c, np.full(len(k), t), device_s[c, k], devices[c, k], slots[c, k]))
    k, c, t, s, d, z = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return _Table(k, c, t, s, d, z)


def _dominated(
    program: Program,
    device_s: FloatArray,
    devices: FloatArray,
    slots: FloatArray,
    usable: FloatArray,
) -> FloatArray:
    """Group classes that need no less of anything than another usable one of the same pool."""
    pools = np.array([c.kind.pool for c in program.classes])
    worse = np.zeros_like(usable)
    for c in range(len(pools)):
        same = (pools == pools[c]) & (np.arange(len(pools)) != c)
        better = (
            usable[same]
            & (device_s[same] <= device_s[c])
            & (devices[same] <= devices[c] * (1 + 1e-12))
            & (slots[same] <= slots[c])
        )
        strictly = (device_s[same] < device_s[c]) | (np.flatnonzero(same)[:, None] < c)
        worse[c] = (better & strictly).any(axis=0)
    return worse


def _linear_program(
    program: Program, table: _Table, taus: FloatArray, num_lengths: int, scale: float
) -> LinearProgram:
    num_times = len(taus) - 1
    least_fixed = min(c.fixed_s for c in program.classes) / scale
    rows: list[IntArray] = []
    columns: list[IntArray] = []
    values: list[FloatArray] = []
    lower: list[float] = []
    upper: list[float] = []

    def add(row: IntArray, column: IntArray, value: FloatArray) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    def begin(count: int, low: float, high: float) -> int:
        lower.extend([low] * count)
        upper.extend([high] * count)
        return len(lower) - count

    count_t, total_t = np.arange(num_times), np.arange(num_times) + num_times
    share = np.arange(len(table.time_class)) + 2 * num_times
    ones = np.ones(num_times)
    add(begin(num_lengths, 1.0, 1.0) + table.length_class, share, np.ones(len(share)))
    pool_of = np.array([c.kind.pool for c in program.classes])[table.group_class]
    sizes = [sum(n) for n in program.nodes]
    sets = [(pool_of == p, sizes[p]) for p in range(len(sizes))] if len(sizes) > 1 else []
    sets.append((np.ones(len(pool_of), dtype=bool), sum(sizes)))
    for inside, size in sets:
        here, t = share[inside], table.time_class[inside]
        base = begin(num_times, -np.inf, 0.0) + count_t
        add(base[t], here, table.device_s[inside] / size / scale)
        add(base, total_t, -ones)
        add(base, count_t, ones * least_fixed)
        for amount in (table.devices[inside], table.slots[inside]):
            base = begin(num_times, -np.inf, 0.0) + count_t
            used = amount > 0
            add(base[t[used]], here[used], amount[used] / size)
            add(base, count_t, -ones)
    base = begin(num_times, 0.0, np.inf) + count_t
    add(base, total_t, ones)
    add(base[1:], count_t[1:], -taus[1:-1] / scale)
    base = begin(num_times - 1, -np.inf, 0.0) + count_t[:-1]
    add(base, total_t[:-1], ones[:-1])
    add(base, count_t[:-1], -taus[1:-1] / scale)
    longest = table.time_class[table.length_class == 0].min()
    base_row = begin(1, 1.0, np.inf)
    add(np.full(num_times - longest, base_row), count_t[longest:], ones[longest:])
    num_columns = 2 * num_times + len(share)
    cost = np.zeros(num_columns)
    cost[total_t] = 1.0
    return LinearProgram(
        cost=cost,
        upper=np.full(num_columns, np.inf),
        row_lower=np.array(lower),
        row_upper=np.array(upper),
        rows=np.concatenate(rows),
        columns=np.concatenate(columns),
        values=np.concatenate(values),
    )
