"""Ruin and recreate: where the long documents go.

From a first arrangement, a step takes out some groups (of one micro-batch whose time is aimed anew,
or a few anywhere) and puts their documents back one by one where they cost least: seconds that they
add to their micro-batch, plus the price of the short documents' room that they take. Worse
arrangements are accepted with a probability that falls to nothing. The work is a number of steps,
so that the same seed gives the same arrangement.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from dist_attn.planner.fluid import Fluid, Groups, OpenGroup, Profile, Score
from dist_attn.planner.insertion import Draft, Inserter, Ledger

#: Groups that a ruin takes out of one micro-batch, on average at the most.
_RUINED = 10


@dataclass(slots=True)
class Arrangement:
    """Micro-batches of groups of long documents, with their profiles and their score."""

    batches: list[Groups]
    profiles: list[Profile]
    score: Score
    #: What insertions ask of it, put together once and only where needed.
    ledger: Ledger | None = None


class Search:
    """The search over one program."""

    def __init__(self, fluid: Fluid, seed: int, max_batches: int, deadline: float) -> None:
        self.fluid = fluid
        self.random = random.Random(seed)
        self.max_batches = max_batches
        self.deadline = deadline
        self.late = False
        self.steps = 0
        self._inserter = Inserter(fluid, self.random)

    def start(self, aim_s: float, num_batches: int, tries: int = 0) -> Arrangement | None:
        """Insert the long documents, longest first, into batches that aim at some times.

        Args:
            aim_s: the time of a batch if all were equal, which is tried first.
            num_batches: how many to begin with; more are opened as needed.
            tries: how many more times to try, with times drawn around that one and the first batch
                as long as the longest document needs in one of its classes.

        Returns:
            The best arrangement, or None when all take more micro-batches than allowed.
        """
        fluid = self.fluid
        best = self._start([aim_s] * num_batches)
        for k in range(tries if fluid.num_long else 0):
            if time.monotonic() > self.deadline:
                self.late = True
                break
            times = [
                aim_s * math.exp(self.random.gauss(-0.2, 0.7))
                for _ in range(num_batches + (k % 4 == 3))
            ]
            option = self.random.choice(fluid.options[0])
            times[0] = fluid.fixed[option] + fluid.seconds[0][option]
            found = self._start(times)
            if found and (best is None or found.score.total < best.score.total):
                best = found
        return best

    def _start(self, times: list[float]) -> Arrangement | None:
        if len(times) > self.max_batches:
            return None
        insert = self._inserter.insert
        draft = self._inserter.draft([[] for _ in times], times, self.fluid.default_price)
        for i in range(self.fluid.num_long):
            if not insert(draft, i):
                self._inserter.add_batch(draft, min(times))
                if len(draft.batches) > self.max_batches or not insert(draft, i):
                    return None
        return self._arrange(draft.batches)

    def run(self, first: Arrangement, steps: int, warmth: float = 0.001) -> Arrangement:
        """Improve by `steps` steps; returns the best arrangement seen."""
        now = best = first
        fruitful = 0
        for step in range(steps):
            if step % 32 == 0 and time.monotonic() > self.deadline:
                self.late = True
                break
            if step - fruitful > max(steps // 3, 100):
                break
            self.steps += 1
            found = self._step(now)
            if found is None:
                continue
            worse = found.score.total - now.score.total
            temperature = warmth * first.score.total * (1 - step / steps) ** 2
            if worse <= 0 or self.random.random() < math.exp(-worse / max(temperature, 1e-300)):
                now = found
                if now.score.total < best.score.total * (1 - 1e-5):
                    best, fruitful = now, step
        return best

    def _arrange(self, batches: list[Groups]) -> Arrangement | None:
        profiles = [self.fluid.profile(groups) for groups in batches]
        if not all(p.feasible for p in profiles):
            return None
        return self._settle(batches, profiles)

    def _settle(self, batches: list[Groups], profiles: list[Profile]) -> Arrangement | None:
        """Score; drop micro-batches that nothing needs, add those that short documents need."""
        score = self.fluid.score(profiles)
        while len(batches) > 1 and [] in batches:
            m = batches.index([])
            fewer = profiles[:m] + profiles[m + 1 :]
            trial = self.fluid.score(fewer)
            if trial.total >= score.total:
                break
            batches, profiles, score = batches[:m] + batches[m + 1 :], fewer, trial
        if score.missing:
            batches = batches + [[] for _ in range(score.missing)]
            if len(batches) > self.max_batches:
                return None
            profiles = profiles + [self.fluid.empty] * score.missing
            score = self.fluid.score(profiles)
        return Arrangement(batches, profiles, score)

    def _step(self, now: Arrangement) -> Arrangement | None:
        if now.ledger is None:
            price = now.score.price or self.fluid.default_price
            now.ledger = self._inserter.ledger(now.batches, now.score.times, price)
        draft = Draft(list(now.batches), list(now.score.times), now.ledger.copy())
        out = self._ruin(draft)
        if not out:
            return None
        for m in draft.changed:
            self._inserter.update(draft, m)
        if self.random.random() < 0.8:
            out.sort()
        else:
            self.random.shuffle(out)
        for i in out:
            if not self._inserter.insert(draft, i):
                return None
        profiles = list(now.profiles)
        for m in sorted(draft.changed):
            profile = self.fluid.profile(draft.batches[m])
            if not profile.feasible:
                return None
            if m < len(profiles):
                profiles[m] = profile
            else:
                profiles.append(profile)
        return self._settle(draft.batches, profiles)

    def _ruin(self, draft: Draft) -> list[int]:
        """Take groups or documents out; returns the documents."""
        choose = self.random.random
        count = len(draft.batches)
        out: list[int] = []
        m = int(choose() * count)
        if choose() < 0.5 and draft.batches[m]:
            aim = self._aim(draft, m)
            most = _RUINED / len(draft.batches[m])
            share = min(0.5 if aim > draft.times[m] else 0.3, most)
            limit = aim * 1.0001
            fixed = self.fluid.fixed
            self._keep(
                draft,
                m,
                [
                    g
                    for g in draft.batches[m]
                    if fixed[g.cls] + g.seconds <= limit and choose() > share
                ],
                out,
            )
            draft.times[m] = aim
            if choose() < 0.7:
                other = int(choose() * count)
                if other != m:
                    fewer = min(0.3, _RUINED / max(len(draft.batches[other]), 1))
                    self._keep(
                        draft, other, [g for g in draft.batches[other] if choose() > fewer], out
                    )
            return out
        for _ in range(2 + int(choose() * 5)):
            m = int(choose() * count)
            groups = draft.batches[m]
            if not groups:
                continue
            victim = groups[int(choose() * len(groups))]
            rest = [g for g in groups if g is not victim]
            if choose() < 0.4 and len(victim.documents) > 1:
                i = victim.documents[int(choose() * len(victim.documents))]
                out.append(i)
                draft.batches[m] = [*rest, self._without(victim, i)]
                draft.changed.add(m)
            else:
                self._keep(draft, m, rest, out)
        return out

    def _aim(self, draft: Draft, m: int) -> float:
        """A new time for a micro-batch: what its slowest group's first document needs elsewhere."""
        fluid, choose = self.fluid, self.random.random
        slowest = max(draft.batches[m], key=lambda g: fluid.fixed[g.cls] + g.seconds)
        i = slowest.documents[0]
        way = choose()
        if way < 0.6:
            options = fluid.options[i]
            cls = options[int(choose() * len(options))]
            return fluid.fixed[cls] + fluid.seconds[i][cls]
        if way < 0.9:
            return draft.times[m] * (0.8 + 0.4 * choose())
        return fluid.empty.need

    def _keep(self, draft: Draft, m: int, kept: Groups, out: list[int]) -> None:
        staying = {id(g) for g in kept}
        for group in draft.batches[m]:
            if id(group) not in staying:
                out.extend(group.documents)
        draft.batches[m] = kept
        draft.changed.add(m)

    def _without(self, group: OpenGroup, i: int) -> OpenGroup:
        return OpenGroup(
            group.cls,
            group.seconds - self.fluid.seconds[i][group.cls],
            group.tokens - self.fluid.lengths[i],
            [d for d in group.documents if d != i],
        )
