"""What a rank's memory for messages of GPUs that copy to each other takes; see `peer_memory`."""

from __future__ import annotations

from collections import Counter

from dist_attn.config import AttentionConfig
from dist_attn.planner.cluster import Cluster
from dist_attn.planner.shape import ModelShape

#: Every lane has two slots, which are filled in turn.
_SLOTS = 2
#: Sums of gradients, and what all-to-alls are prepared for, are in float32.
_WIDE = 4


def slot_bytes_per_token(
    attention: AttentionConfig, shape: ModelShape, cluster: Cluster | None
) -> int:
    """Bytes of one group's slots per token of a rank, by the strategy that takes most; 0: none.

    A rank that works in several groups has slots in each.

    Args:
        attention: says the strategies, and whether GPUs copy.
        shape: of the model that a rank computes.
        cluster: None where it is not known: then none are counted.
    """
    if cluster is None or not attention.copy_engines:
        return 0
    if all(d.name == "cpu" for d in cluster.devices) or max(Counter(cluster.node_of).values()) < 2:
        return 0
    d, e = shape.head_dim, shape.bytes_per_element
    # Keys and values; their gradients on the way, and those that come home.
    exchanged = 2 * shape.num_kv_heads * d * (e + 2 * max(_WIDE, e))
    # Of each rank of the group as much as one sends to it of queries, keys and values.
    traded = (shape.num_heads + 2 * shape.num_kv_heads) * d * _WIDE
    # Of strategies in two levels the inner one is that of a node.
    inner = {s.split("+")[0] for s in attention.strategies}
    return _SLOTS * max(traded if s == "ulysses" else exchanged for s in inner)
