"""What ranks spend on documents of which they hold uneven shares (`free` placement).

Of a document that the ranks of a group share:

- linear work goes by tokens. So does attention in a ring or a gather: a zigzag gives a rank with a
  share x of the tokens the share x of the causal area, whatever the other shares are. Ulysses deals
  out heads, so that every rank of the group has the same attention.
- a rank exchanges what a rank with an even share would, or more in proportion where its share is
  larger. Behind attention it hides as much as the rank's own attention lasts.

Together the ranks therefore never take less than with even shares, which is what bounds rely on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, FloatArray, GroupKind, IntArray


@dataclass(frozen=True)
class Team:
    """The ranks of one group: what kind of group they are, and the kind of device of each."""

    kind: GroupKind
    pools: tuple[int, ...]

    @classmethod
    def of(cls, ranks: tuple[int, ...], strategy: str, cluster: Cluster) -> Team:
        """The team of these ranks."""
        pools = tuple(cluster.device_of[r] for r in ranks)
        pool = pools[0] if len(set(pools)) == 1 else -1
        return cls(GroupKind(len(ranks), strategy, pool, cluster.spans_nodes(ranks)), pools)


@dataclass(frozen=True)
class Terms:
    """A document's seconds on one kind of device in a group of some kind, for an even share."""

    degree: int
    strategy: str
    linear_s: float
    attention_s: float
    exchange_s: float
    overlap: float

    def seconds(self, fractions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Computation, and communication that it does not hide, of ranks with these fractions."""
        d = self.degree
        attention = self.attention_s * d * fractions
        if self.strategy == "ulysses":
            attention = np.full(len(fractions), self.attention_s)
        exchange = self.exchange_s * np.maximum(1.0, d * fractions)
        if self.strategy == "gather":
            exchange = np.where(fractions > 0, exchange, 0.0)
        excess = np.maximum(exchange - self.overlap * attention, 0.0)
        return self.linear_s * d * fractions + attention, excess

    @property
    def least_s(self) -> float:
        """Seconds of a rank of the group that holds none of the document."""
        if self.strategy == "gather":
            return 0.0
        return self.exchange_s + (self.attention_s if self.strategy == "ulysses" else 0.0)

    def lines(self) -> list[tuple[float, float]]:
        """Seconds of a rank as the maximum of lines base + slope * fraction."""
        d = self.degree
        if self.strategy == "ulysses":
            base, slope = self.attention_s, self.linear_s * d
            found = [(base + self.exchange_s, slope), (base, slope + self.exchange_s * d)]
        else:
            work = self.linear_s * d + self.attention_s * d
            hidden = self.overlap * self.attention_s * d
            excess = max(self.exchange_s * d - hidden, 0.0)
            found = [(self.exchange_s, work - hidden), (0.0, work + excess)]
        return found

    def most(self, seconds: FloatArray) -> FloatArray:
        """The largest fraction that takes a rank no longer than `seconds`; 0 where none does."""
        found = np.full(len(seconds), np.inf)
        for base, slope in self.lines():
            room = seconds - base
            found = np.minimum(found, room / slope if slope > 0 else np.where(room < 0, 0, np.inf))
        return np.maximum(found, 0.0)


def terms(cost: Costs, kind: GroupKind, lengths: IntArray) -> list[Terms]:
    """The terms of each document in groups of a kind."""
    linear = cost.linear_s(kind, lengths)
    attention = cost.compute_s(kind, lengths) - linear
    exchange = cost.exchange_s(kind, lengths)
    overlap = cost.overlap(kind)
    columns = zip(linear.tolist(), attention.tolist(), exchange.tolist(), strict=True)
    return [Terms(kind.degree, kind.strategy, *column, overlap) for column in columns]


def rank_seconds(
    cost: Costs, team: Team, lengths: IntArray, shares: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Seconds of computation and of communication on each rank of a group.

    Args:
        cost: seconds of evenly shared groups.
        team: the ranks.
        lengths: int64 [documents].
        shares: int64 [documents, ranks], tokens of each document on each rank.
    """
    compute, communication = np.zeros(len(team.pools)), np.zeros(len(team.pools))
    fractions = shares / np.maximum(lengths, 1)[:, None]
    for pool in sorted(set(team.pools)):
        mine = np.array(team.pools) == pool
        for row, term in zip(
            fractions[:, mine], terms(cost, replace(team.kind, pool=pool), lengths), strict=True
        ):
            work, excess = term.seconds(row)
            compute[mine] += work
            communication[mine] += excess
    return compute, communication
