"""Micro-batches with their long documents in place and the short ones poured in like a fluid.

Long documents decide a plan; short ones fill what is left. `Fluid` therefore scores an arrangement
of the long documents alone. In a group of class c that holds t tokens and s seconds of them, at
micro-batch time T there is room for min(Q_c - t, (T - f_c - s) * slope_c) tokens of short
documents, where slope_c is how many of them a second pays for; devices in no group count as groups
of the filler class. A micro-batch lasts at least as long as its slowest group. What its short
documents need beyond that is bought where a second buys most tokens, which is exact because the
room of a micro-batch is concave in T from there on.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from dist_attn.planner.program import Program


@dataclass(slots=True)
class OpenGroup:
    """A group under construction; documents by their place in the program."""

    cls: int
    seconds: float
    tokens: int
    documents: list[int] = field(default_factory=list)


#: One micro-batch under construction.
Groups = list[OpenGroup]


@dataclass(frozen=True, slots=True)
class Profile:
    """One micro-batch: least seconds, short tokens that fit into them, what more time buys.

    `segments` are (minus tokens per second, tokens), the best first. `feasible` says whether the
    devices suffice.
    """

    need: float
    base: float
    segments: tuple[tuple[float, float], ...]
    feasible: bool


@dataclass(frozen=True, slots=True)
class Score:
    """An arrangement: its micro-batches' seconds, how many are missing, and a token's price."""

    total: float
    times: list[float]
    #: Micro-batches of short documents only that have to be added.
    missing: int
    price: float


class Fluid:
    """The tables of one program, with its first `num_long` documents kept apart."""

    def __init__(self, program: Program, num_long: int) -> None:
        classes = program.classes
        self.program = program
        self.num_long = num_long
        self.degree = [c.degree for c in classes]
        self.fixed = [c.fixed_s for c in classes]
        self.capacity = [c.capacity_tokens for c in classes]
        self.pool = [c.kind.pool for c in classes]
        self.crosses = [c.kind.crosses_nodes for c in classes]
        self.lengths: list[int] = program.lengths.tolist()
        #: By document, then by class.
        self.seconds: list[list[float]] = program.seconds.T.tolist()
        self.short_tokens = int(program.lengths[num_long:].sum())
        self.rate = _rates(program, num_long if self.short_tokens else 0)
        self.slope = [1 / r if 0 < r < math.inf else 0.0 for r in self.rate]
        self.pool_sizes = [sum(nodes) for nodes in program.nodes]
        self.fillers = [self._filler(p) for p in range(len(self.pool_sizes))]
        self.options: list[list[int]] = []
        self.openings: list[list[tuple[int, int, int, float, float, int]]] = []
        self.limit(range(len(classes)))
        self.empty = self.profile([])
        self.default_price = -1 / min(self.empty.segments)[0] if self.empty.segments else 0.0

    def _filler(self, pool: int) -> int:
        """The class that spends the fewest device seconds on short documents (-1: none)."""
        own = [c for c, p in enumerate(self.pool) if p == pool and self.slope[c] > 0]
        return min(own, key=lambda c: (self.degree[c] * self.rate[c], self.degree[c]), default=-1)

    def limit(self, classes: Collection[int]) -> bool:
        """Allow new groups of these classes only; whether that leaves out any that were allowed.

        For each long document, `options` are the classes worth opening (of all, where none of these
        fits), and `openings` what they cost: class, pool, degree, seconds with that document alone,
        short tokens per second, capacity.
        """
        everything = range(len(self.degree))
        before = self.options
        found = [self._options(i, classes) for i in range(self.num_long)]
        self.options = [o or self._options(i, everything) for i, o in enumerate(found)]
        self.openings = [
            [
                (
                    c,
                    self.pool[c],
                    self.degree[c],
                    self.fixed[c] + seconds[c],
                    self.slope[c],
                    self.capacity[c],
                )
                for c in options
            ]
            for options, seconds in zip(self.options, self.seconds, strict=False)
        ]
        return before != self.options

    def _options(self, i: int, classes: Collection[int], most: int = 8) -> list[int]:
        """Classes of which no other is both quicker and cheaper."""
        seconds = self.seconds[i]
        fitting = [c for c in classes if seconds[c] < math.inf]
        by_work = sorted(fitting, key=lambda c: (seconds[c] * self.degree[c], self.degree[c]))
        kept: list[int] = []
        for c in by_work:
            rivals = [k for k in kept if self.pool[k] == self.pool[c]]
            if all(self.fixed[k] + seconds[k] > self.fixed[c] + seconds[c] for k in rivals):
                kept.append(c)
        return kept[:most]

    def free_devices(self, groups: Groups) -> list[int] | None:
        """Devices left in each pool, None when there are too few or nodes do not fit."""
        free = list(self.pool_sizes)
        anywhere = 0
        for group in groups:
            pool = self.pool[group.cls]
            if pool < 0:
                anywhere += self.degree[group.cls]
            else:
                free[pool] -= self.degree[group.cls]
        if min(free) < 0 or sum(free) < anywhere:
            return None
        while anywhere:
            pool = max(range(len(free)), key=free.__getitem__)
            part = min(anywhere, free[pool])
            free[pool] -= part
            anywhere -= part
        if self.program.tight_nodes and not self._fits_nodes(groups):
            return None
        return free

    def _fits_nodes(self, groups: Groups) -> bool:
        """Whether the groups that stay inside a node find one, largest first."""
        for pool, sizes in enumerate(self.program.nodes):
            inside = sorted(
                (
                    self.degree[g.cls]
                    for g in groups
                    if self.pool[g.cls] == pool and not self.crosses[g.cls] and g.cls >= 0
                ),
                reverse=True,
            )
            # Groups that need whole nodes take them first.
            across = sum(
                self.degree[g.cls]
                for g in groups
                if self.pool[g.cls] == pool and self.crosses[g.cls]
            )
            free = sorted(sizes, reverse=True)
            while across and free:
                part = min(free[0], across)
                across -= part
                free[0] -= part
                free.sort(reverse=True)
            for degree in inside:
                fitting = [n for n, left in enumerate(free) if left >= degree]
                if not fitting:
                    return False
                free[min(fitting, key=free.__getitem__)] -= degree
        return True

    def profile(self, groups: Groups) -> Profile:
        """Describe one micro-batch; see the module."""
        free = self.free_devices(groups)
        if free is None:
            return Profile(0.0, 0.0, (), False)
        need = max((self.fixed[g.cls] + g.seconds for g in groups), default=0.0)
        opened = []
        for filler, devices in zip(self.fillers, free, strict=True):
            if filler >= 0 and devices >= self.degree[filler]:
                opened.append((filler, devices // self.degree[filler]))
                need = max(need, self.fixed[filler])
        base, ramps = 0.0, []
        for filler, count in opened:
            slope, room = self.slope[filler], self.capacity[filler]
            held = (need - self.fixed[filler]) * slope
            if held >= room:
                base += count * room
            else:
                base += count * held
                ramps.append(((room - held) / slope, count * slope))
        for g in groups:
            cls = g.cls
            slope, room = self.slope[cls], self.capacity[cls] - g.tokens
            held = (need - self.fixed[cls] - g.seconds) * slope
            if held >= room:
                base += room
            elif slope:
                base += held
                ramps.append(((room - held) / slope, slope))
        return Profile(need, base, _segments(ramps), True)

    def score(self, profiles: list[Profile]) -> Score:
        """Buy time for the short documents where it is cheapest."""
        times = [p.need for p in profiles]
        left = self.short_tokens - sum(p.base for p in profiles)
        price = self.default_price
        if left <= 0:
            return Score(sum(times), times, 0, price)
        market = sorted((s, tokens, m) for m, p in enumerate(profiles) for s, tokens in p.segments)
        for slope, tokens, m in market:
            part = min(tokens, left)
            times[m] -= part / slope
            left -= part
            if left <= 0:
                return Score(sum(times), times, 0, -1 / slope)
        missing, total = 0, sum(times)
        room = self.empty.base + sum(tokens for _, tokens in self.empty.segments)
        full_s = self.empty.need - sum(tokens / slope for slope, tokens in self.empty.segments)
        while left > 0 and room > 0:
            whole = int(left // room)
            if whole:
                missing, left, total = missing + whole, left - whole * room, total + whole * full_s
                continue
            missing, total = missing + 1, total + self._time_for(left)
            left = 0
        return Score(total, times, missing, full_s / room if room else price)

    def _time_for(self, tokens: float) -> float:
        """Seconds of an empty micro-batch that takes these short tokens."""
        time, left = self.empty.need, tokens - self.empty.base
        for slope, part in self.empty.segments:
            if left <= 0:
                break
            time -= min(part, left) / slope
            left -= part
        return time


def _rates(program: Program, first: int) -> list[float]:
    """Seconds per token of each class, averaged over the documents from `first` on."""
    tokens = int(program.lengths[first:].sum())
    if not tokens:
        return [0.0] * len(program.classes)
    return [float(r) for r in program.seconds[:, first:].sum(axis=1) / tokens]


def _segments(ramps: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Ramps (seconds until full, tokens per second) as pieces of their sum, steepest first."""
    ramps.sort()
    slope = sum(s for _, s in ramps)
    found, last = [], 0.0
    for seconds, own in ramps:
        if seconds > last:
            found.append((-slope, (seconds - last) * slope))
            last = seconds
        slope -= own
    return tuple(found)


def count_long(program: Program, at_least: int = 8) -> int:
    """How many documents are long: those that take more than half of a small group."""
    classes = program.classes
    if all(c.kind.pool < 0 for c in classes):
        # No pool has groups of its own that short documents could fill.
        return len(program.lengths)
    degree = np.array([c.degree for c in classes])[:, None]
    work = (program.seconds * degree).min(axis=0)
    smallest = min(c.capacity_tokens for c in classes)
    room = sum(max(c.capacity_tokens // c.degree for c in classes) * sum(n) for n in program.nodes)
    batches = max(1.0, math.ceil(float(program.lengths.sum()) / max(room, 1)))
    seconds = float(work.sum()) / program.num_devices / batches
    cheapest = int(np.argmin((program.seconds * degree)[:, -1]))
    long = (program.lengths * 2 > smallest) | (program.seconds[cheapest] * 2 > seconds)
    return min(len(program.lengths), max(int(np.count_nonzero(long)), at_least))
