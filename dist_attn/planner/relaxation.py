"""The linear program of `bounds` as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_attn.planner.costs import FloatArray, IntArray
from dist_attn.planner.highs import LinearProgram
from dist_attn.planner.program import Program

#: Longest documents that are length classes of their own, and those that are branched on.
_SINGLES = 12
_BRANCHED = 12
#: Longest documents whose groups must exist as a whole.
_PRESENT = 2
#: Boundaries spread over the times, and how far apart (as a factor) boundaries are.
_TIME_CLASSES = 4
_APART = 1.02
#: Micro-batches of a plan for which one boundary more pays.
_FEW = 3


@dataclass(frozen=True)
class Relaxation:
    """The linear program, seconds per unit of its objective, and where its columns are.

    Columns: count and total of each time class, parts of each tier and time class, then shares.
    """

    linear: LinearProgram
    scale_s: float
    num_times: int
    #: First of the rows that bound how many micro-batches lie in a time class or a later one.
    first_sum_row: int
    first_share: int
    #: Of each share.
    group_class: IntArray
    time_class: IntArray
    #: Columns of each of the longest documents.
    long_columns: tuple[IntArray, ...]


@dataclass(frozen=True)
class _Shares:
    """One entry per (length class, group class, time class) that may be used."""

    length_class: IntArray
    group_class: IntArray
    time_class: IntArray
    #: What the whole length class takes, as a share of all devices.
    device_s: FloatArray
    memory: FloatArray
    slots: FloatArray
    #: Least seconds that one of its documents needs in a group, fixed time included.
    need_s: FloatArray


@dataclass(frozen=True)
class _Lengths:
    """Length classes: where each starts, how many documents, their tokens, their least costs."""

    starts: IntArray
    counts: FloatArray
    tokens: FloatArray
    shortest: FloatArray
    #: [group classes, length classes]
    least_s: FloatArray
    least_s_per_token: FloatArray


@dataclass
class _Rows:
    """A growing list of rows."""

    rows: list[IntArray] = field(default_factory=list)
    columns: list[IntArray] = field(default_factory=list)
    values: list[FloatArray] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def begin(self, count: int, lower: float, upper: float) -> IntArray:
        """Start rows with these limits; returns their indices."""
        self.lower += [lower] * count
        self.upper += [upper] * count
        return np.arange(len(self.lower) - count, len(self.lower))

    def add(self, rows: IntArray, columns: IntArray, values: FloatArray | float) -> None:
        """Set entries."""
        self.rows.append(rows)
        self.columns.append(columns)
        self.values.append(np.broadcast_to(np.asarray(values, dtype=np.float64), rows.shape))


def build_relaxation(program: Program, times: Sequence[float], predicted_s: float) -> Relaxation:
    """Set up the program for plans that take no longer than `predicted_s`."""
    scale = predicted_s / max(len(times), 1) or 1.0
    taus = _time_classes(program, times, predicted_s)
    lengths = _length_classes(program)
    tiers = _tiers(program)
    shares = _shares(program, lengths, taus, tiers)
    num_times, num_tiers = len(taus) - 1, int(tiers.max()) + 1
    first_share = (2 + num_tiers) * num_times
    rows = _Rows()
    share = np.arange(len(shares.time_class)) + first_share
    rows.add(rows.begin(len(lengths.starts), 1.0, 1.0)[shares.length_class], share, 1.0)
    _add_devices(rows, program, shares, tiers, taus, scale)
    _add_times(rows, shares, lengths, taus, scale, first_share)
    first_sum_row = len(rows.lower)
    for t, row in enumerate(rows.begin(num_times, 0.0, np.inf)):
        later = np.arange(t, num_times)
        rows.add(np.full(len(later), row), later, 1.0)
    cost = np.zeros(first_share + len(share))
    cost[num_times : 2 * num_times] = 1.0
    linear = LinearProgram(
        cost=cost,
        row_lower=np.array(rows.lower),
        row_upper=np.array(rows.upper),
        rows=np.concatenate(rows.rows),
        columns=np.concatenate(rows.columns),
        values=np.concatenate(rows.values),
    )
    long = [share[shares.length_class == k] for k in range(min(_BRANCHED, len(lengths.starts)))]
    return Relaxation(
        linear=linear,
        scale_s=scale,
        num_times=num_times,
        first_sum_row=first_sum_row,
        first_share=first_share,
        group_class=shares.group_class,
        time_class=shares.time_class,
        long_columns=tuple(c for k, c in enumerate(long) if lengths.counts[k] == 1),
    )


def _time_classes(program: Program, times: Sequence[float], predicted_s: float) -> FloatArray:
    """Boundaries of the time classes: evenly spread, and just above a known plan's times.

    A plan that is to be better has no micro-batch longer than the whole known one.
    """
    fixed = np.array([c.fixed_s for c in program.classes])[:, None]
    low = float((program.seconds + fixed).min(axis=0).min())
    high = min(max(times) * 1.1, predicted_s)
    if high <= 0:
        return np.array([0.0, np.inf])
    low = max(min(low, *times), high * 1e-2)
    spread = np.geomspace(low, high, _TIME_CLASSES).tolist()
    spread.append(float(np.sqrt(high * predicted_s)))
    if len(times) <= _FEW:
        # What the longest document leaves of its group's memory depends on the time beyond its own.
        need = (program.seconds + fixed)[:, 0]
        spread += (np.append(need[np.isfinite(need)], max(times)) * 1.03).tolist()
    kept = [0.0]
    for tau in sorted([*spread, *(t * 1.003 for t in times)]):
        if tau < predicted_s * 0.999:
            if kept[-1] > 0 and tau < kept[-1] * _APART and tau not in spread:
                kept[-1] = tau
            elif tau > kept[-1] * _APART:
                kept.append(tau)
    return np.array([*kept, predicted_s * (1 + 1e-6)])


def _length_classes(program: Program, tolerance: float = 0.02) -> _Lengths:
    """Documents whose work per token differs by at most `tolerance`; the longest alone."""
    degrees = np.array([c.degree for c in program.classes])[:, None]
    # Empty documents cost nothing and must not lend their price to the others of their class.
    costs = np.where(program.lengths > 0, program.seconds, np.inf)
    per_token = costs / np.maximum(program.lengths, 1)
    cheapest = (per_token * degrees).min(axis=0).tolist()
    fits = np.isfinite(program.seconds).sum(axis=0).tolist()
    starts = [0]
    for i in range(1, len(program.lengths)):
        first = starts[-1]
        if (
            i < _SINGLES
            or cheapest[i] < cheapest[first] * (1 - tolerance)
            or cheapest[i] > cheapest[first] * (1 + tolerance)
            or fits[i] != fits[first]
        ):
            starts.append(i)
    at = np.array(starts)
    ends = np.append(at[1:], len(program.lengths))
    return _Lengths(
        starts=at,
        counts=(ends - at).astype(np.float64),
        tokens=np.add.reduceat(program.lengths, at).astype(np.float64),
        shortest=program.lengths[ends - 1].astype(np.float64),
        least_s=np.minimum.reduceat(program.seconds, at, axis=1),
        least_s_per_token=np.minimum.reduceat(per_token, at, axis=1),
    )


def _tiers(program: Program, tolerance: float = 0.05) -> IntArray:
    """Number the group classes' tiers: one pool, and device time per short token about equal."""
    half = len(program.lengths) // 2
    tokens = max(int(program.lengths[half:].sum()), 1)
    degrees = np.array([c.degree for c in program.classes])
    rates = (degrees * program.seconds[:, half:].sum(axis=1) / tokens).tolist()
    pools = [c.kind.pool for c in program.classes]
    tiers = np.zeros(len(rates), dtype=np.int64)
    current, pool, first = -1, None, 0.0
    for c in sorted(range(len(rates)), key=lambda c: (pools[c], rates[c])):
        if pools[c] != pool or rates[c] > first * (1 + tolerance):
            current, pool, first = current + 1, pools[c], rates[c]
        tiers[c] = current
    return tiers


def _shares(program: Program, lengths: _Lengths, taus: FloatArray, tiers: IntArray) -> _Shares:
    degrees = np.array([c.degree for c in program.classes], dtype=np.float64)[:, None]
    fixed = np.array([c.fixed_s for c in program.classes])[:, None]
    # A class that has room for none of the lengths is used by none.
    room = np.array([c.capacity_tokens for c in program.classes], dtype=np.float64)[:, None]
    capacity = np.maximum(room, 1.0)
    devices = float(program.num_devices)
    counts, shortest, least_s = lengths.counts, lengths.shortest, lengths.least_s
    fits = np.isfinite(least_s)
    least = np.where(fits, least_s, 0.0)
    per_token = np.where(np.isfinite(lengths.least_s_per_token), lengths.least_s_per_token, 0.0)
    device_s = per_token * lengths.tokens * degrees / devices
    plain = lengths.tokens * degrees / capacity / devices
    lowest_rate = per_token.min(axis=1, where=per_token > 0, initial=np.inf)
    lowest_rate = np.where(np.isfinite(lowest_rate), lowest_rate, 1e-300)
    # Rows of single documents ask for their seconds, and of the very longest for whole groups.
    rank = np.arange(least.shape[1])
    quick = np.where((rank < _SINGLES) & (counts == 1), fixed + least, 0.0)
    whole = np.where(rank < _PRESENT, np.broadcast_to(degrees, least.shape), 0.0)
    parts = []
    for t in range(len(taus) - 1):
        spare = taus[t + 1] - fixed
        usable = fits & (least <= spare)
        alone = usable & ((2 * shortest > capacity) | (2 * least > spare))
        # Tokens that others can put beside a document that is alone.
        beside = np.minimum(capacity - shortest, (spare - least) / lowest_rate[:, None])
        lone = counts * (capacity - np.maximum(beside, 0.0)) * degrees / capacity / devices
        memory = np.where(alone, np.maximum(lone, plain), plain)
        slots = np.where(alone, counts * degrees / devices, 0.0)
        usable &= ~_dominated(tiers, usable, (device_s, memory, slots, quick, whole))
        c, k = np.nonzero(usable)
        parts.append(
            (
                k,
                c,
                np.full(len(k), t),
                device_s[c, k],
                memory[c, k],
                slots[c, k],
                (fixed + least)[c, k],
            )
        )
    return _Shares(*(np.concatenate(p) for p in zip(*parts, strict=True)))


def _dominated(
    tiers: IntArray, usable: npt.NDArray[np.bool_], needs: tuple[FloatArray, ...]
) -> npt.NDArray[np.bool_]:
    """Group classes that need no less of anything than another usable one of the same tier."""
    worse = np.zeros_like(usable)
    for c in range(len(tiers)):
        for rival in np.flatnonzero(tiers == tiers[c]):
            if rival == c:
                continue
            better = usable[rival].copy()
            strictly = np.full(better.shape, bool(rival < c))
            for need in needs:
                better &= need[rival] <= need[c] * (1 + 1e-9)
                strictly |= need[rival] < need[c] * (1 - 1e-9)
            worse[c] |= better & strictly
    return worse


def _add_devices(
    rows: _Rows, program: Program, shares: _Shares, tiers: IntArray, taus: FloatArray, scale: float
) -> None:
    """Device seconds and devices per pool and in all; memory, slots and seconds per tier."""
    num_times, num_tiers = len(taus) - 1, int(tiers.max()) + 1
    first_share = (2 + num_tiers) * num_times
    share = np.arange(len(shares.time_class)) + first_share
    at = np.arange(num_times)
    fixed = np.array([c.fixed_s for c in program.classes])
    pools = np.array([c.kind.pool for c in program.classes])
    sizes = [sum(nodes) / program.num_devices for nodes in program.nodes]
    sets: list[tuple[IntArray, float]] = [(np.arange(len(pools)), 1.0)]
    if len(sizes) > 1:
        sets += [(np.flatnonzero(pools == p), size) for p, size in enumerate(sizes)]
    for classes, size in sets:
        inside = np.isin(shares.group_class, classes)
        row = rows.begin(num_times, -np.inf, 0.0)
        rows.add(row[shares.time_class[inside]], share[inside], shares.device_s[inside] / scale)
        rows.add(row, at + num_times, -size)
        rows.add(row, at, size * float(fixed.min()) / scale)
        row = rows.begin(num_times, -np.inf, 0.0)
        for tier in sorted(set(tiers[classes].tolist())):
            rows.add(row, (2 + tier) * num_times + at, 1.0)
        rows.add(row, at, -size)
    part = np.arange(num_tiers * num_times) + 2 * num_times
    mine = tiers[shares.group_class] * num_times + shares.time_class
    for amount in (shares.memory, shares.slots):
        row = rows.begin(len(part), -np.inf, 0.0)
        used = amount > 0
        rows.add(row[mine[used]], share[used], amount[used])
        rows.add(row, part, -1.0)
    _add_presence(rows, program, shares, mine, num_times, first_share)
    if num_tiers > 1:
        row = rows.begin(len(part), -np.inf, 0.0)
        rows.add(row[mine], share, shares.device_s / scale)
        least = np.array([fixed[tiers == q].min() for q in range(num_tiers)])
        spare = np.maximum(taus[None, 1:] - least[:, None], 0.0)
        rows.add(row, part, -spare.ravel() / scale)


def _add_presence(
    rows: _Rows, program: Program, shares: _Shares, mine: IntArray, num_times: int, first_share: int
) -> None:
    """A tier that holds the longest document has at least that document's whole group."""
    degrees = np.array([c.degree for c in program.classes])[shares.group_class]
    share_of_devices = degrees / program.num_devices
    longest = (shares.length_class < _PRESENT) & (shares.slots == 0) & (share_of_devices >= 0.2)
    pair = shares.length_class * (mine.max() + 1) + mine
    for key in np.unique(pair[longest]):
        members = np.flatnonzero(longest & (pair == key))
        row = np.repeat(rows.begin(1, -np.inf, 0.0), len(members) + 1)
        part = 2 * num_times + mine[members[0]]
        columns = np.concatenate([members + first_share, [part]]).astype(np.int64)
        rows.add(row, columns, np.concatenate([share_of_devices[members], [-1.0]]))


def _add_times(
    rows: _Rows,
    shares: _Shares,
    lengths: _Lengths,
    taus: FloatArray,
    scale: float,
    first_share: int,
) -> None:
    """Totals between their boundaries, and long enough for each of the longest documents."""
    num_times = len(taus) - 1
    at = np.arange(num_times)
    row = rows.begin(num_times, 0.0, np.inf)
    rows.add(row, at + num_times, 1.0)
    rows.add(row[1:], at[1:], -taus[1:-1] / scale)
    row = rows.begin(num_times, -np.inf, 0.0)
    rows.add(row, at + num_times, 1.0)
    rows.add(row, at, -taus[1:] / scale)
    longest = int(shares.time_class[shares.length_class == 0].min())
    holding = at[longest:]
    rows.add(np.repeat(rows.begin(1, 1.0, np.inf), len(holding)), holding, 1.0)
    beyond = (shares.need_s - taus[shares.time_class]) / scale
    single = (shares.length_class < _SINGLES) & (lengths.counts[shares.length_class] == 1)
    pair = shares.length_class * num_times + shares.time_class
    for key in np.unique(pair[single & (beyond > 1e-9)]):
        members = np.flatnonzero(pair == key)
        t = int(key % num_times)
        row = np.repeat(rows.begin(1, 0.0, np.inf), len(members) + 1 + (t > 0))
        columns = np.concatenate([members + first_share, [num_times + t], [t][: t > 0]])
        values = np.concatenate(
            [-np.maximum(beyond[members], 0), [1.0], [-taus[t] / scale][: t > 0]]
        )
        rows.add(row, columns.astype(np.int64), values)
