"""A long document into an arrangement, where it costs least.

What counts is the seconds that the document adds to its micro-batch, plus the price of the short
documents' room that it takes. It joins an open group or opens a new one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_attn.planner.fluid import Fluid, Groups, OpenGroup

#: Open groups that an insertion looks at, shared among the micro-batches; of more, a random run.
_LOOKED_AT = 320

#: A group that may be joined: tokens and seconds left, what the short documents' room in it is
#: worth, short tokens per second, its class and its position.
Row = tuple[int, float, float, float, int, int]


@dataclass(slots=True)
class Ledger:
    """What an insertion asks of every micro-batch, at the time that is aimed at.

    `tables` are rows of the groups with room, the roomiest first, or None where not yet asked for.
    """

    price: float
    free: list[list[int]]
    #: Price of the short tokens that one free device of each pool holds.
    worth: list[list[float]]
    tables: list[list[Row] | None]

    def copy(self) -> Ledger:
        """A ledger that can be changed; what stays the same is shared."""
        return Ledger(self.price, list(self.free), list(self.worth), list(self.tables))


@dataclass(slots=True)
class Draft:
    """An arrangement that documents are being put into, with the times that are aimed at."""

    batches: list[Groups]
    times: list[float]
    ledger: Ledger
    changed: set[int] = field(default_factory=set)
    #: Micro-batches and classes for which devices were counted but nodes do not fit.
    barred: set[tuple[int, int]] = field(default_factory=set)


class Inserter:
    """Puts documents of one program into drafts."""

    def __init__(self, fluid: Fluid, source: random.Random) -> None:
        self.fluid = fluid
        self.random = source
        program = fluid.program
        #: Whether a group may find no place although there are devices enough.
        self._intricate = program.tight_nodes or len(program.nodes) > 1

    def ledger(self, batches: Sequence[Groups], times: Sequence[float], price: float) -> Ledger:
        """The ledger of micro-batches that aim at some times."""
        return Ledger(
            price,
            [self._free(groups) for groups in batches],
            [self._worth(t, price) for t in times],
            [None] * len(times),
        )

    def draft(self, batches: list[Groups], times: list[float], price: float) -> Draft:
        """A new draft."""
        return Draft(batches, times, self.ledger(batches, times, price))

    def add_batch(self, draft: Draft, time_s: float) -> None:
        """Add a micro-batch that aims at a time."""
        draft.batches.append([])
        draft.times.append(time_s)
        ledger = draft.ledger
        ledger.free.append(list(self.fluid.pool_sizes))
        ledger.worth.append(self._worth(time_s, ledger.price))
        ledger.tables.append(None)

    def update(self, draft: Draft, m: int) -> None:
        """Take up that groups or the time of a micro-batch have changed."""
        ledger = draft.ledger
        ledger.free[m] = self._free(draft.batches[m])
        ledger.worth[m] = self._worth(draft.times[m], ledger.price)
        ledger.tables[m] = None

    def insert(self, draft: Draft, i: int) -> bool:
        """Put a document where it costs least, into an open group or a new one."""
        fluid, ledger = self.fluid, draft.ledger
        joined = self._best_group(draft, i)
        opened = self._feasible_opening(draft, i)
        if joined is None and opened is None:
            return False
        if opened is None or (joined is not None and joined[0] <= opened[0]):
            assert joined is not None
            _, m, position = joined
            groups = list(draft.batches[m])
            old = groups[position]
            cls = old.cls
            group = OpenGroup(
                cls,
                old.seconds + fluid.seconds[i][cls],
                old.tokens + fluid.lengths[i],
                [*old.documents, i],
            )
            groups[position] = group
            draft.batches[m] = groups
        else:
            _, m, cls = opened
            if m == len(draft.batches):
                self.add_batch(draft, 0.0)
            group = OpenGroup(cls, fluid.seconds[i][cls], fluid.lengths[i], [i])
            draft.batches[m] = [*draft.batches[m], group]
            pool = fluid.pool[cls]
            if pool >= 0:
                free = list(ledger.free[m])
                free[pool] -= fluid.degree[cls]
                ledger.free[m] = free
        draft.changed.add(m)
        ledger.tables[m] = None
        needed = fluid.fixed[cls] + group.seconds
        if needed > draft.times[m]:
            draft.times[m] = needed
            ledger.worth[m] = self._worth(needed, ledger.price)
        return True

    def _free(self, groups: Groups) -> list[int]:
        free = list(self.fluid.pool_sizes)
        for group in groups:
            pool = self.fluid.pool[group.cls]
            if pool >= 0:
                free[pool] -= self.fluid.degree[group.cls]
        return free

    def _worth(self, time_s: float, price: float) -> list[float]:
        fluid = self.fluid
        worth = []
        for filler in fluid.fillers:
            if filler < 0:
                worth.append(0.0)
                continue
            held = (time_s - fluid.fixed[filler]) * fluid.slope[filler]
            held = max(min(held, fluid.capacity[filler]), 0.0)
            worth.append(price * held / fluid.degree[filler])
        return worth

    def _table(self, draft: Draft, m: int) -> list[Row]:
        """The groups of a micro-batch that have room for the shortest of the long documents."""
        fluid, price, time_s = self.fluid, draft.ledger.price, draft.times[m]
        fixed, slopes, capacity = fluid.fixed, fluid.slope, fluid.capacity
        shortest = fluid.lengths[fluid.num_long - 1]
        table = []
        for position, group in enumerate(draft.batches[m]):
            cls = group.cls
            room = capacity[cls] - group.tokens
            if room >= shortest:
                spare = time_s - fixed[cls] - group.seconds
                slope = slopes[cls]
                lost = spare * slope
                table.append(
                    (room, spare, price * (lost if lost < room else room), slope, cls, position)
                )
        table.sort(reverse=True)
        draft.ledger.tables[m] = table
        return table

    def _best_group(self, draft: Draft, i: int) -> tuple[float, int, int] | None:
        """The open group that a document joins at the least cost: (cost, micro-batch, position)."""
        choose, price = self.random.random, draft.ledger.price
        length, seconds = self.fluid.lengths[i], self.fluid.seconds[i]
        best, found = math.inf, None
        window = max(_LOOKED_AT // len(draft.batches), 16)
        for m, known in enumerate(draft.ledger.tables):
            table = self._table(draft, m) if known is None else known
            if len(table) > window:
                first = int(choose() * (len(table) - window))
                table = table[first : first + window]
            for room, spare, lost, slope, cls, position in table:
                if room < length:
                    break
                left = spare - seconds[cls]
                if left >= 0:
                    kept, rest = left * slope, room - length
                    cost = lost - price * (kept if kept < rest else rest)
                else:
                    cost = lost - left
                # Now and then the best is overlooked, for variety.
                if cost < best and choose() > 0.1:
                    best, found = cost, (cost, m, position)
        return found

    def _feasible_opening(self, draft: Draft, i: int) -> tuple[float, int, int] | None:
        """The best opening whose devices exist, also where counting them does not tell."""
        while True:
            opened = self._best_opening(draft, i)
            if opened is None or not self._intricate:
                return opened
            _, m, cls = opened
            group = OpenGroup(cls, 0.0, 0, [i])
            if self.fluid.free_devices([*draft.batches[m], group]) is not None:
                return opened
            # Groups are only added to a draft, so that this stays so.
            draft.barred.add((m, cls))

    def _best_opening(self, draft: Draft, i: int) -> tuple[float, int, int] | None:
        """The new group that costs a document least: (cost, micro-batch, class)."""
        fluid, choose, price = self.fluid, self.random.random, draft.ledger.price
        length, barred = fluid.lengths[i], draft.barred
        best, found = math.inf, None
        rows = fluid.openings[i]
        for m, free in enumerate(draft.ledger.free):
            most = sum(free)
            if not most:
                continue
            time_s, worth = draft.times[m], draft.ledger.worth[m]
            for cls, pool, degree, needed, slope, capacity in rows:
                if degree > (free[pool] if pool >= 0 else most) or (barred and (m, cls) in barred):
                    continue
                cost = degree * (worth[pool] if pool >= 0 else min(worth))
                left = time_s - needed
                if left >= 0:
                    kept, room = left * slope, capacity - length
                    cost -= price * (kept if kept < room else room)
                else:
                    cost -= left
                if cost < best and choose() > 0.1:
                    best, found = cost, (cost, m, cls)
        return found
