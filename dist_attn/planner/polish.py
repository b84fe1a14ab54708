"""Documents exchanged between the groups of a finished plan.

A micro-batch lasts as long as its slowest group. That group gives one or two documents to another
group, for none, one or two of that group's, so that it gets quicker, while the other one stays
quicker than the slowest was (in the same micro-batch) or within its micro-batch's time. What is
left in the end is a plan in which none of the exchanges looked at shortens a micro-batch.

All exchanges with a handful of groups, those with most time to spare first, are weighed at once in
arrays; further groups are looked at where these have none. The work is limited by a number of
exchanges.
"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import replace

import numpy as np

from dist_attn.planner.costs import FloatArray, IntArray
from dist_attn.planner.fluid import Groups
from dist_attn.planner.program import Program

#: What a group may offer at the most: nothing, one document or two, of each length one.
_OFFERS = 32
#: Groups weighed at once.
_PARTNERS = 4
#: Groups weighed at the most before a micro-batch is left as it is.
_LOOKED_AT = 96
#: What an exchange gains at least, as a share of the micro-batch's time.
_GAIN = 1e-5


class Polish:
    """A plan under improvement; documents by their place in the program, one more for none."""

    def __init__(self, program: Program, batches: list[Groups]) -> None:
        self.batches = batches
        groups = [g for batch in batches for g in batch]
        classes = program.classes
        self.cls = np.array([g.cls for g in groups])
        self.batch = np.array([m for m, batch in enumerate(batches) for _ in batch])
        self.documents = [list(g.documents) for g in groups]
        self.capacity = np.array([classes[c].capacity_tokens for c in self.cls])
        self.fixed = np.array([classes[c].fixed_s for c in self.cls])
        self.none = len(program.lengths)
        self.lengths = np.append(program.lengths, 0)
        self.seconds = np.append(program.seconds, np.zeros((len(classes), 1)), axis=1)
        self.tokens = np.zeros(len(groups), dtype=np.int64)
        self.times = np.zeros(len(groups))
        #: Offers of each group: pairs of documents, their tokens, and their seconds in every
        #: class (not a number: no offer).
        self.offered = np.full((len(groups), _OFFERS, 2), self.none)
        self.offer_tokens = np.zeros((len(groups), _OFFERS), dtype=np.int64)
        self.offer_s = np.full((len(classes), len(groups), _OFFERS), np.nan)
        for group in range(len(groups)):
            self._take_stock(group)

    def run(self, exchanges: int, deadline: float) -> list[Groups]:
        """Exchange until nothing helps or the number is used up; returns the plan."""
        open_batches = [m for m, batch in enumerate(self.batches) if batch]
        while open_batches and exchanges > 0 and time.monotonic() < deadline:
            for m in tuple(open_batches):
                exchanges -= 1
                if not self._shorten(m):
                    open_batches.remove(m)
        return self._plan()

    def _shorten(self, m: int) -> bool:
        """One exchange of the slowest group of a micro-batch; whether there was one."""
        members = np.flatnonzero(self.batch == m)
        if not len(members):
            return False  # the search has left nothing in this micro-batch
        slowest = int(members[np.argmax(self.times[members])])
        ends = np.zeros(len(self.batches))
        np.maximum.at(ends, self.batch, self.times)
        limits = ends[self.batch]
        limits[members] *= 1 - _GAIN
        spare = limits - self.times
        order = np.argsort(-spare, kind="stable")
        order = order[(order != slowest) & (spare[order] > 0)][:_LOOKED_AT]
        return any(
            self._exchange(slowest, order[first : first + _PARTNERS], limits)
            for first in range(0, len(order), _PARTNERS)
        )

    def _exchange(self, a: int, others: IntArray, limits: FloatArray) -> bool:
        """The best exchange of group `a` with one of the others; whether there is one."""
        cls, classes = self.cls[a], self.cls[others]
        given, taken = self.offer_tokens[a], self.offer_tokens[others]
        # [groups, offers taken, offers given]
        moved = given - taken[:, :, None]
        with np.errstate(invalid="ignore"):  # no offer against no offer is none
            mine = self.offer_s[cls, others][:, :, None] - self.offer_s[cls, a]
            theirs = self.offer_s[classes, a][:, None] - self.offer_s[classes, others][:, :, None]
        rest = self.capacity - self.tokens
        allowed = (
            (mine < limits[a] - self.times[a])
            & (theirs <= (limits - self.times)[others][:, None, None])
            & (moved >= -rest[a])
            & (moved <= rest[others][:, None, None])
        )
        found = np.flatnonzero(allowed)
        if not len(found):
            return False
        new = self.times[a] + mine.ravel()[found]
        partner = found // (_OFFERS * _OFFERS)
        beside = self.batch[others][partner] == self.batch[a]
        other_new = self.times[others][partner] + theirs.ravel()[found]
        best = int(found[np.argmin(np.where(beside, np.maximum(new, other_new), new))])
        k, of_other, of_mine = np.unravel_index(best, allowed.shape)
        self._swap(a, int(others[k]), self.offered[a, of_mine], self.offered[others[k], of_other])
        return True

    def _swap(self, a: int, b: int, given: IntArray, taken: IntArray) -> None:
        give = [d for d in given.tolist() if d != self.none]
        take = [d for d in taken.tolist() if d != self.none]
        self.documents[a] = [d for d in self.documents[a] if d not in give] + take
        self.documents[b] = [d for d in self.documents[b] if d not in take] + give
        self._take_stock(a)
        self._take_stock(b)

    def _take_stock(self, group: int) -> None:
        """Recompute a group's time, tokens and offers."""
        cls = self.cls[group]
        documents = sorted(self.documents[group])
        at = np.array(documents, dtype=np.int64)
        self.tokens[group] = self.lengths[at].sum()
        self.times[group] = self.fixed[group] + self.seconds[cls, at].sum()
        # Of documents of one length the first stands for all, and the second beside it.
        lengths = self.lengths[at].tolist()
        one: list[int] = []
        twice: list[tuple[int, int]] = []
        for k, length in enumerate(lengths):
            if k == 0 or length != lengths[k - 1]:
                one.append(documents[k])
            elif not twice or twice[-1][0] != one[-1]:
                twice.append((one[-1], documents[k]))
        pairs = twice + [(one[i], one[j]) for i, j in _pairs(len(one))]
        room = _OFFERS - 1 - len(one)
        if len(pairs) > max(room, 0):
            pairs = [pairs[k * len(pairs) // room] for k in range(room)] if room > 0 else []
        offers = [(self.none, self.none), *((d, self.none) for d in one), *pairs][:_OFFERS]
        size = len(offers)
        offered = np.array(offers)
        self.offered[group, :size] = offered
        self.offer_tokens[group, :size] = self.lengths[offered].sum(axis=1)
        self.offer_s[:, group, :size] = self.seconds[:, offered].sum(axis=2)
        self.offer_s[:, group, size:] = np.nan

    def _plan(self) -> list[Groups]:
        found: list[Groups] = []
        number = 0
        for batch in self.batches:
            row: Groups = []
            for group in batch:
                documents = sorted(self.documents[number])
                if documents:
                    seconds = float(self.times[number] - self.fixed[number])
                    tokens = int(self.tokens[number])
                    row.append(replace(group, seconds=seconds, tokens=tokens, documents=documents))
                number += 1
            found.append(row)
        return [row for row in found if row]


@functools.cache
def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))
