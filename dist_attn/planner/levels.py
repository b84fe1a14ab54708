"""What strategies in two levels cost: one inside the nodes of a group, the other between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_attn.planner.costs import GroupKind, LinkRates
from dist_attn.planner.shape import ModelShape


@dataclass(frozen=True)
class Levels:
    """A group as nodes of `inner` ranks, `outer` of them.

    An all-to-all, inside nodes or between them, runs over that level's link and is hidden by
    nothing. After it each rank has the tokens of those it traded with for its share of the heads,
    and a ring or a gather passes these on at the other level. Without one a block goes outer - 1
    times to the next node, and meanwhile outer times inner - 1 places round its node; the slower of
    the two counts. A gather costs as a ring here, which is the most it can.
    """

    strategy: str
    inner: int
    outer: int
    inner_link: LinkRates
    outer_link: LinkRates

    @property
    def num_heads_needed(self) -> int:
        """Query heads that all-to-alls need, so that every rank has one."""
        inside, between = self._trades
        return (self.inner if inside else 1) * (self.outer if between else 1)

    @property
    def _trades(self) -> tuple[bool, bool]:
        """Whether heads are traded inside nodes, and between them."""
        inside, between = self.strategy.split("+")
        return inside == "ulysses", between == "ulysses"

    def latency_s(self, shape: ModelShape) -> float:
        """Seconds of one layer's messages, forward and backward."""
        passes = shape.attention_forwards + 1
        inside, between = self._trades
        trades = (shape.forwards + 1) * 2
        rounds = 1 if between else self.outer
        if inside:
            inner = trades * math.log2(self.inner)
        else:
            inner = passes * rounds * (self.inner - 1) + self.inner * rounds
        if between:
            outer = trades * math.log2(self.outer)
        else:
            outer = passes * (self.outer - 1) + self.outer
        return inner * self.inner_link.latency_s + outer * self.outer_link.latency_s

    def seconds_per_token(self, shape: ModelShape) -> tuple[float, float]:
        """Seconds of a token's exchanges: those that nothing hides, and those behind attention."""
        ranks = self.inner * self.outer
        inside, between = self._trades
        kv_heads = shape.num_kv_heads
        if inside or between:
            kv_heads = max(kv_heads, min(self.num_heads_needed, shape.num_heads))
        elements = 2 * (shape.num_heads + kv_heads) * shape.head_dim
        sent = elements * shape.bytes_per_element * (shape.forwards + 1) * shape.num_layers / ranks
        # Keys and values on every pass, and their gradients in float32.
        bytes_each = (shape.attention_forwards + 1) * shape.bytes_per_element + 4
        kv = 2 * kv_heads * shape.head_dim * bytes_each * shape.num_layers / ranks
        exposed, behind = 0.0, 0.0
        if inside:
            exposed += sent * (self.inner - 1) / self.inner / self.inner_link.bytes_per_s
        else:
            rounds = 1 if between else self.outer
            behind = kv * rounds * (self.inner - 1) / self.inner_link.bytes_per_s
        if between:
            exposed += sent * (self.outer - 1) / self.outer / self.outer_link.bytes_per_s
        else:
            behind = max(behind, kv * (self.outer - 1) / self.outer_link.bytes_per_s)
        return exposed, behind


def inner_size(kind: GroupKind, inner_degree: int | None, devices_per_node: int) -> int | None:
    """Ranks of a node in such a group, or None where it does not fall into several equal nodes.

    Args:
        kind: the group.
        inner_degree: the configured size, for groups of any place; by default whole nodes of the
            cluster, for groups across them.
        devices_per_node: of the cluster.
    """
    inner = inner_degree or (devices_per_node if kind.crosses_nodes else 1)
    if inner < 2 or kind.degree % inner or kind.degree == inner:
        return None
    return inner


def strategy_letters(strategy: str) -> str:
    """A strategy in short, a letter for each level: `r` for ring, `ug` for ulysses+gather."""
    return "".join(level[0] for level in strategy.split("+"))
