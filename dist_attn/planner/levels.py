"""What strategies in two levels cost: one inside the nodes of a group, the other between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_attn.planner.costs import GroupKind, LinkRates
from dist_attn.planner.shape import ModelShape


@dataclass(frozen=True)
class Levels:
    """A group as nodes of `inner` ranks, `outer` of them.

    With d = inner * outer ranks, the all-to-all or the ring inside a node runs over the node's own
    link. Between nodes:

    - after an all-to-all each rank has its node's tokens for 1 / inner of the heads: a ring or a
      gather passes these on outer - 1 times.
    - a double ring sends each block outer - 1 times to the next node, and meanwhile outer times
      inner - 1 places round its node; the slower of the two counts.
    """

    strategy: str
    inner: int
    outer: int
    inner_link: LinkRates
    outer_link: LinkRates

    def latency_s(self, shape: ModelShape) -> float:
        """Seconds of one layer's messages, forward and backward."""
        passes = shape.attention_forwards + 1
        between = (passes * (self.outer - 1) + self.outer) * self.outer_link.latency_s
        if self.strategy.startswith("ulysses"):
            trades = (shape.forwards + 1) * 2 * math.log2(self.inner)
            return trades * self.inner_link.latency_s + between
        hops = passes * self.outer * (self.inner - 1) + self.inner * self.outer
        return hops * self.inner_link.latency_s + between

    def seconds_per_token(self, shape: ModelShape) -> tuple[float, float]:
        """Seconds of a token's exchanges: those that nothing hides, and those behind attention."""
        ranks = self.inner * self.outer
        ulysses = self.strategy.startswith("ulysses")
        kv_heads = shape.num_kv_heads
        if ulysses:
            kv_heads = max(kv_heads, min(self.inner, shape.num_heads))
        # Keys and values on every pass, and their gradients in float32.
        bytes_each = (shape.attention_forwards + 1) * shape.bytes_per_element + 4
        kv = 2 * kv_heads * shape.head_dim * bytes_each * shape.num_layers / ranks
        between = kv * (self.outer - 1) / self.outer_link.bytes_per_s
        if not ulysses:
            inside = kv * self.outer * (self.inner - 1) / self.inner_link.bytes_per_s
            return 0.0, max(inside, between)
        elements = 2 * (shape.num_heads + kv_heads) * shape.head_dim
        sent = elements * shape.bytes_per_element * (shape.forwards + 1) * shape.num_layers / ranks
        return sent * (self.inner - 1) / self.inner / self.inner_link.bytes_per_s, between


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
