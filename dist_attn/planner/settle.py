"""The documents of one micro-batch onto ranks, each where and in what shares there is room.

Every rank has room for some tokens and, until a given time, some seconds. Documents come one by
one, those with most work first. One that fits a rank goes there whole, to the rank whose free
tokens and seconds it suits best. Any other is shared by the block of ranks with most room, of the
cheapest kind of group for which a block has room enough, as evenly as the block's rooms allow. What
is left in the end are crumbs of room on many ranks, and a document is split over as many of them as
it takes: whatever fits the ranks together fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_attn.layout import shares_of_fractions
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.costs import Costs, FloatArray, GroupKind, IntArray
from dist_attn.planner.leveling import Sharing, level
from dist_attn.planner.program import Program
from dist_attn.planner.uneven import Terms, terms


@dataclass(frozen=True)
class Placed:
    """A document (by its place in the program) on a block of ranks."""

    document: int
    ranks: tuple[int, ...]
    #: The class of the program, -1 for one rank.
    cls: int
    shares: tuple[int, ...]


@dataclass
class _Rooms:
    """What is left on every rank."""

    tokens: IntArray
    seconds: FloatArray


class Settler:
    """The tables of one program, for any number of micro-batches and times."""

    def __init__(self, program: Program, cluster: Cluster, cost: Costs) -> None:
        self.program = program
        self.pool_of = np.array(cluster.device_of)
        pools = range(len(cluster.devices))
        alone = [GroupKind(1, "local", p) for p in pools]
        #: Seconds of every rank before its first token, and its room.
        self.fixed_s = max(cost.fixed_s(kind) for kind in alone)
        self.capacity = np.array([cost.capacity_tokens(alone[p]) for p in cluster.device_of])
        #: By document, then by rank: whole on that rank.
        by_pool = np.stack([cost.compute_s(kind, program.lengths) for kind in alone])
        self.alone_s = by_pool[self.pool_of].T
        self.order = np.argsort(-by_pool.max(axis=0), kind="stable")
        work = program.seconds * np.array([c.degree for c in program.classes])[:, None]
        self.least_s = work.min(axis=0)
        #: Per document, classes of several ranks, the cheapest in device seconds first.
        ranked = np.argsort(work, axis=0, kind="stable")
        shared = [c for c, k in enumerate(program.classes) if k.degree > 1]
        self.classes = {
            i: [c for c in ranked[:, i].tolist() if c in shared] for i in self.order.tolist()
        }
        self.blocks = {c: _blocks(program.classes[c].kind, cluster) for c in shared}
        self.latency_s = {c: max(program.classes[c].fixed_s - self.fixed_s, 0.0) for c in shared}
        self.terms: dict[tuple[int, int], list[Terms]] = {
            (c, p): terms(cost, replace(program.classes[c].kind, pool=p), program.lengths)
            for c in shared
            for p in (pools if program.classes[c].kind.pool < 0 else [program.classes[c].kind.pool])
        }

    def least_time(self, documents: Sequence[int]) -> float:
        """Seconds that a micro-batch of these documents takes at least."""
        return self.fixed_s + float(self.least_s[list(documents)].sum()) / len(self.capacity)

    def settle(
        self, documents: Sequence[int], time_s: float, ranks: Sequence[int] | None = None
    ) -> list[Placed] | None:
        """Place the documents so that every rank ends by `time_s`, or None.

        Args:
            documents: by their places in the program.
            time_s: the time.
            ranks: where they may lie; anywhere by default.
        """
        self.span = time_s - self.fixed_s
        rooms = _Rooms(self.capacity.copy(), np.full(len(self.capacity), time_s - self.fixed_s))
        if ranks is not None:
            outside = np.ones(len(self.capacity), dtype=bool)
            outside[list(ranks)] = False
            rooms.tokens[outside], rooms.seconds[outside] = 0, -1.0
        chosen = set(documents)
        lengths = self.program.lengths
        tokens_left = int(lengths[list(documents)].sum())
        seconds_left = float(self.least_s[list(documents)].sum())
        placed = []
        for i in self.order.tolist():
            if i not in chosen:
                continue
            # How scarce tokens and seconds are decides which of them a document should spare.
            weights = (
                tokens_left / max(int(rooms.tokens.sum()), 1),
                seconds_left / max(float(rooms.seconds.sum()), 1e-12),
            )
            found = self._whole(rooms, i, weights) or self._shared(rooms, i)
            if found is None:
                return None
            placed.append(found)
            tokens_left -= int(lengths[i])
            seconds_left -= float(self.least_s[i])
        return placed

    def level(self, placed: list[Placed]) -> list[Placed]:
        """The same documents on the same ranks, with shares that let the last rank end soonest."""
        world = len(self.capacity)
        work, tokens = np.zeros(world), np.zeros(world, dtype=np.int64)
        sharings: list[Sharing] = []
        shared: list[int] = []
        for number, p in enumerate(placed):
            ranks = list(p.ranks)
            if len(ranks) == 1:
                work[ranks] += self.alone_s[p.document, ranks[0]]
                tokens[ranks] += p.shares[0]
                continue
            own = tuple(self.terms[p.cls, int(self.pool_of[r])][p.document] for r in ranks)
            work[ranks] += self.latency_s[p.cls]
            shared.append(number)
            sharings.append(Sharing(sum(p.shares), p.ranks, own))
        fractions = level(sharings, work, tokens, self.capacity)
        if fractions is None:
            return placed
        result = list(placed)
        rooms = self.capacity - tokens
        for number, sharing, found in zip(shared, sharings, fractions, strict=True):
            ranks = list(sharing.ranks)
            dealt = shares_of_fractions([sharing.length], found[None])[0]
            rooms[ranks] -= dealt
            result[number] = replace(placed[number], shares=tuple(dealt.tolist()))
        # Where not a token was to spare, rounding may have overfilled a rank.
        return placed if (rooms < 0).any() else result

    def spread(self, documents: Sequence[int], cls: int, ranks: tuple[int, ...]) -> list[Placed]:
        """Share documents that fit a group together as evenly as its rooms allow."""
        if len(ranks) == 1:
            lengths = self.program.lengths
            return [Placed(i, ranks, -1, (int(lengths[i]),)) for i in documents]
        block = np.array(ranks)
        tokens = self.capacity[block].copy()
        placed = []
        for i in documents:
            length = int(self.program.lengths[i])
            fractions = _even(tokens / max(length, 1))
            shares = _within(shares_of_fractions([length], fractions[None])[0], tokens)
            tokens -= shares
            placed.append(Placed(i, ranks, cls, tuple(shares.tolist())))
        return placed

    def end(self, placed: list[Placed]) -> float:
        """When the last rank ends."""
        seconds = np.zeros(len(self.capacity))
        latencies = {(p.cls, p.ranks) for p in placed if p.cls >= 0}
        for cls, ranks in latencies:
            seconds[list(ranks)] += self.latency_s[cls]
        for p in placed:
            if p.cls < 0:
                seconds[p.ranks[0]] += self.alone_s[p.document, p.ranks[0]]
                continue
            for rank, share in zip(p.ranks, p.shares, strict=True):
                term = self.terms[p.cls, int(self.pool_of[rank])][p.document]
                work, excess = term.seconds(np.array([share / max(sum(p.shares), 1)]))
                seconds[rank] += float(work[0] + excess[0])
        return self.fixed_s + float(seconds.max())

    def _whole(self, rooms: _Rooms, i: int, weights: tuple[float, float]) -> Placed | None:
        length, alone = int(self.program.lengths[i]), self.alone_s[i]
        fits = (rooms.tokens >= length) & (rooms.seconds >= alone)
        if not fits.any():
            return None
        suits = (
            weights[0] * length / self.capacity.max() * (rooms.tokens / self.capacity.max())
            + weights[1] * alone * rooms.seconds / max(float(rooms.seconds.max()), 1e-12) ** 2
        )
        rank = int(np.argmax(np.where(fits, suits, -np.inf)))
        rooms.tokens[rank] -= length
        rooms.seconds[rank] -= alone[rank]
        return Placed(i, (rank,), -1, (length,))

    def _shared(self, rooms: _Rooms, i: int) -> Placed | None:
        length = int(self.program.lengths[i])
        for c in self.classes[i]:
            kind = self.program.classes[c].kind
            seconds = rooms.seconds - self.latency_s[c]
            most, joins = rooms.tokens / max(length, 1), np.zeros(len(seconds), dtype=bool)
            for pool in [kind.pool] if kind.pool >= 0 else sorted(set(self.pool_of.tolist())):
                mine, term = self.pool_of == pool, self.terms[c, pool][i]
                most[mine] = np.minimum(most[mine], term.most(seconds[mine]))
                joins[mine] = seconds[mine] >= term.least_s
            blocks = self.blocks[c]
            room = most[blocks]
            # Every rank of the group takes part, also one that holds nothing.
            total = np.where(joins[blocks].all(axis=1), room.sum(axis=1), 0.0)
            fits = total >= 1
            if not fits.any():
                continue
            suits = (
                length
                / self.capacity.max()
                * (rooms.tokens[blocks].sum(axis=1) / self.capacity.max())
                + self.least_s[i] * rooms.seconds[blocks].sum(axis=1) / max(self.span, 1e-12) ** 2
            )
            best = int(np.argmax(np.where(fits, suits, -np.inf)))
            return self._take(rooms, i, c, blocks[best], room[best])
        return None

    def _take(self, rooms: _Rooms, i: int, c: int, ranks: IntArray, most: FloatArray) -> Placed:
        """Share a document as evenly as the rooms allow."""
        length = int(self.program.lengths[i])
        fractions = _even(most)
        shares = shares_of_fractions([length], fractions[None])[0]
        shares = _within(shares, rooms.tokens[ranks])
        for k, rank in enumerate(ranks.tolist()):
            term = self.terms[c, int(self.pool_of[rank])][i]
            work, excess = term.seconds(shares[k : k + 1] / length)
            rooms.seconds[rank] -= self.latency_s[c] + float(work[0] + excess[0])
        rooms.tokens[ranks] -= shares
        return Placed(i, tuple(ranks.tolist()), c, tuple(shares.tolist()))


def _blocks(kind: GroupKind, cluster: Cluster) -> IntArray:
    """The ranks of every group of a kind, as rows."""
    pools = cluster.pools if kind.pool < 0 else (cluster.pools[kind.pool],)
    nodes = [node for pool in pools for node in pool]
    stretches = [tuple(sorted(r for n in nodes for r in n))] if kind.crosses_nodes else nodes
    rows = [
        stretch[first : first + kind.degree]
        for stretch in stretches
        for first in range(0, len(stretch) - kind.degree + 1, kind.degree)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, kind.degree)


def _even(most: FloatArray) -> FloatArray:
    """Fractions that add up to one, none above its limit, the largest as small as can be."""
    ascending = np.sort(most)
    below = np.concatenate([[0.0], np.cumsum(ascending)[:-1]])
    left = len(most) - np.arange(len(most))
    # The first limit that need not be reached: what is missing is shared by it and those above.
    level = (1.0 - below) / left
    fits = np.flatnonzero(level <= ascending * (1 + 1e-12))
    top = level[fits[0]] if len(fits) else ascending[-1]
    return np.asarray(np.minimum(most, top))


def _within(shares: IntArray, rooms: IntArray) -> IntArray:
    """Move the tokens that rounding put on a full rank to one with room."""
    over = shares - rooms
    if (over <= 0).all():
        return shares
    moved = np.maximum(over, 0)
    shares = shares - moved
    for _ in range(int(moved.sum())):
        shares[int(np.argmax(rooms - shares))] += 1
    return shares
