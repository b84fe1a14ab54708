"""What a group of ranks costs: seconds of its documents, bytes of its fullest rank.

A group's time is `fixed + sum over its documents of (compute + communication)`, where each term
depends on the document's length, the degree, the strategy, the devices and whether the group
crosses nodes. Keeping it a sum over documents is what makes the planner's program linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from dist_attn.errors import PlanError
from dist_attn.planner.cluster import Cluster, fingerprint
from dist_attn.planner.costs import DeviceRates, FloatArray, GroupKind, IntArray, LinkRates
from dist_attn.planner.levels import Levels, inner_size
from dist_attn.planner.memory import MemoryModel, Sharding
from dist_attn.planner.shape import ModelShape


@dataclass(frozen=True)
class CostModel:
    """Costs of a transformer with causal documents, from rates, bytes and latencies.

    With n tokens in a document, area A = n (n + 1) / 2 or what its masks let through, and degree d:

    - compute: (linear n + pair A) / d, exactly the work, never n squared.
    - ulysses: all-to-all of queries, keys, values and outputs, forward and backward. A rank
      sends the share of its n / d tokens that leaves the node over the slower link while the rest
      stays inside. Key/value heads are repeated up to d where there are fewer.
    - ring: d - 1 exchanges of keys and values, in the backward also of their float32 gradients.
      Each document's exchange is hidden behind that document's own attention; the excess counts.
    - gather: as a ring, of the keys that masks let a rank see.
    - two levels: see `dist_attn.planner.levels`.
    - fixed: the cluster's micro-batch overhead and the latencies of every layer's exchanges
      (d - 1 messages for a ring and d for its gradients, log2 d for an all-to-all).
    """

    shape: ModelShape
    #: Per kind of device of the cluster.
    devices: tuple[DeviceRates, ...]
    intra_node: LinkRates
    inter_node: LinkRates
    devices_per_node: int
    micro_batch_overhead_s: float
    static_bytes: int
    bytes_per_token: int
    #: Share of a ring exchange that attention can hide.
    ring_overlap: float = 0.9
    #: Lengths and, at each, the pairs of a document that the layers' masks let through, the mean of
    #: layers and heads; empty for causal layers. See `dist_attn.masks.layers.mean_area`.
    area_lengths: tuple[int, ...] = ()
    area_pairs: tuple[float, ...] = ()
    #: Ranks of a node for strategies in two levels; None: the cluster's own nodes.
    inner_degree: int | None = None
    #: Where the coefficients come from: `derived` or a calibration file.
    source: str = field(default="derived", compare=False)

    @classmethod
    def derive(
        cls,
        shape: ModelShape,
        cluster: Cluster,
        sharding: Sharding | int,
        max_tokens_per_device: int | Mapping[str, int] | None = None,
        areas: tuple[tuple[int, ...], tuple[float, ...]] = ((), ()),
    ) -> CostModel:
        """Work out the coefficients from the model's operations and the devices' rates.

        Forward and backward of a matrix take 2 + 4 operations per parameter and token; of attention
        4 head_dim + 10 head_dim per pair and head (the backward does five products for two). With
        recomputation the forward is paid twice, but for attention that is kept.

        Args:
            shape: the model.
            cluster: where it runs.
            sharding: how parameters, gradients and optimizer state are sharded; a number is a ZeRO
                stage.
            max_tokens_per_device: a cap on every rank's tokens, or one per kind of device by name.
            areas: lengths and areas of masks that are not causal; pairs cost the same in any mask.
        """
        caps = max_tokens_per_device
        if isinstance(sharding, int):
            sharding = Sharding(sharding)
        memory = MemoryModel.of(shape, cluster.world_size, sharding)
        # Of the moments of a step the one that limits the smallest device.
        moment = memory.binding(min(d.memory_bytes for d in cluster.devices))
        linear = (2 * shape.forwards + 4) * shape.matrix_parameters
        pair = (
            (4 * shape.attention_forwards + 10)
            * shape.head_dim
            * shape.num_heads
            * shape.num_layers
        )
        return cls(
            shape=shape,
            devices=tuple(
                DeviceRates(
                    linear_s_per_token=linear / d.linear_flops_per_s,
                    attention_s_per_pair=pair / d.attention_flops_per_s,
                    memory_bytes=d.memory_bytes,
                    max_tokens=caps.get(d.name) if isinstance(caps, Mapping) else caps,
                )
                for d in cluster.devices
            ),
            intra_node=LinkRates(cluster.intra_node.bytes_per_s, cluster.intra_node.latency_s),
            inter_node=LinkRates(cluster.inter_node.bytes_per_s, cluster.inter_node.latency_s),
            devices_per_node=max(len(n) for p in cluster.pools for n in p),
            micro_batch_overhead_s=cluster.micro_batch_overhead_s,
            static_bytes=memory.static_bytes + moment.constant_bytes,
            bytes_per_token=moment.bytes_per_token,
            ring_overlap=cluster.ring_overlap,
            area_lengths=areas[0],
            area_pairs=areas[1],
        )

    def allows(self, kind: GroupKind) -> bool:
        """All-to-all gives every rank at least one query head; two levels need whole nodes."""
        if "+" in kind.strategy:
            levels = self._levels(kind)
            return levels is not None and levels.num_heads_needed <= self.shape.num_heads
        return kind.strategy != "ulysses" or kind.degree <= self.shape.num_heads

    def fixed_s(self, kind: GroupKind) -> float:
        """Overhead of a micro-batch and the latencies of its exchanges."""
        if kind.degree == 1:
            return self.micro_batch_overhead_s
        latency_s = (self.inter_node if kind.crosses_nodes else self.intra_node).latency_s
        levels = self._levels(kind)
        if levels is not None:
            latency_s = levels.latency_s(self.shape)
            return self.micro_batch_overhead_s + self.shape.num_layers * latency_s
        if kind.strategy == "ulysses":
            # Two all-to-alls each way.
            messages = (self.shape.forwards + 1) * 2 * math.log2(kind.degree)
        else:
            # Keys and values on every way, and the gradients' way home.
            messages = (self.shape.attention_forwards + 1) * (kind.degree - 1) + kind.degree
        return self.micro_batch_overhead_s + self.shape.num_layers * messages * latency_s

    def compute_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Linear and attention work of each document, shared evenly."""
        work = self._linear_s(kind) * lengths + self._attention_s(kind, lengths)
        return np.asarray(work / kind.degree, dtype=np.float64)

    def communication_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Exchange that attention does not hide."""
        hidden = self.overlap(kind) * self._attention_s(kind, lengths) / kind.degree
        excess = np.maximum(self.exchange_s(kind, lengths) - hidden, 0.0)
        levels = self._levels(kind)
        exposed = 0.0 if levels is None else levels.seconds_per_token(self.shape)[0]
        return np.asarray(exposed * lengths + excess, dtype=np.float64)

    def linear_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """Linear work of each document, shared evenly."""
        return np.asarray(self._linear_s(kind) * lengths / kind.degree, dtype=np.float64)

    def exchange_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        """All-to-alls, a ring's exchanges, or what a gather fetches; of two levels the outer's."""
        if kind.degree == 1:
            return np.zeros(len(lengths))
        levels = self._levels(kind)
        if levels is not None:
            return np.asarray(levels.seconds_per_token(self.shape)[1] * lengths, dtype=np.float64)
        if kind.strategy == "ulysses":
            return np.asarray(self._ulysses_s_per_token(kind) * lengths, dtype=np.float64)
        moved = self._ring_s_per_token(kind) * lengths
        if kind.strategy == "gather":
            moved = moved * self._needed_share(kind.degree, lengths)
        return np.asarray(moved, dtype=np.float64)

    def _needed_share(self, degree: int, lengths: IntArray) -> FloatArray:
        """Of a document's keys on other ranks, the share that the neediest rank's queries see.

        Its two pieces see what their last queries see: windows, and columns that all share. That is
        the slope of the area there; of a causal document the last piece sees everything.
        """
        n = lengths.astype(np.float64)
        elsewhere = np.maximum(n * (degree - 1) / degree, 1.0)
        seen = self._keys_at(n) + self._keys_at(n / (2 * degree))
        return np.asarray(np.minimum(seen / elsewhere, 1.0))

    def _keys_at(self, n: FloatArray) -> FloatArray:
        """Keys that queries see at the end of a document, the mean of its last sixteenth."""
        last = np.maximum(n / 16, 1.0)
        before = np.maximum(n - last, 0.0)
        return np.asarray((self.pairs(n) - self.pairs(before)) / np.maximum(n - before, 1.0))

    def overlap(self, kind: GroupKind) -> float:
        """Nothing hides an all-to-all: attention needs all of it, and comes before the next."""
        return 0.0 if kind.degree == 1 or kind.strategy == "ulysses" else self.ring_overlap

    def capacity_tokens(self, kind: GroupKind) -> int:
        """Tokens that a rank of this kind of device can hold: its memory, or the configured cap."""
        return self.tokens_per_device(kind.pool)

    def tokens_per_device(self, pool: int = -1) -> int:
        """Capacity of one device of a pool (-1: of the smallest) in tokens."""
        devices = self.devices if pool < 0 else (self.devices[pool],)
        return min(self._tokens(d) for d in devices)

    def _tokens(self, device: DeviceRates) -> int:
        tokens = (device.memory_bytes - self.static_bytes) // self.bytes_per_token
        if tokens < 1:
            raise PlanError(
                f"the model leaves no memory for tokens: parameters, gradients, optimizer and "
                f"logits take {self.static_bytes / 2**30:.1f} GiB of "
                f"{device.memory_bytes / 2**30:.1f} GiB on each rank; use a higher ZeRO stage, "
                f"more ranks or devices with more memory"
            )
        return tokens if device.max_tokens is None else min(tokens, device.max_tokens)

    def memory_bytes(self, tokens: int) -> int:
        """Static memory and that of the tokens."""
        return self.static_bytes + tokens * self.bytes_per_token

    def fingerprint(self) -> str:
        """A short hash of the coefficients."""
        data = asdict(self)
        data.pop("source")
        if self.inner_degree is None:
            data.pop("inner_degree")  # so that plans without it keep their fingerprint
        return fingerprint(data)

    def _levels(self, kind: GroupKind) -> Levels | None:
        if "+" not in kind.strategy:
            return None
        inner = inner_size(kind, self.inner_degree, self.devices_per_node)
        if inner is None:
            return None
        outer_link = self.inter_node if kind.crosses_nodes else self.intra_node
        outer = kind.degree // inner
        return Levels(kind.strategy, inner, outer, self.intra_node, outer_link)

    def _linear_s(self, kind: GroupKind) -> float:
        devices = self.devices if kind.pool < 0 else (self.devices[kind.pool],)
        return max(d.linear_s_per_token for d in devices)

    def _attention_s(self, kind: GroupKind, lengths: IntArray) -> FloatArray:
        devices = self.devices if kind.pool < 0 else (self.devices[kind.pool],)
        return max(d.attention_s_per_pair for d in devices) * self.pairs(lengths)

    def pairs(self, lengths: IntArray | FloatArray) -> FloatArray:
        """Pairs of each document that are computed, by the mean of layers and heads."""
        n = lengths.astype(np.float64)
        if not self.area_lengths:
            return n * (n + 1) / 2
        # Keys per query are linear in the length where a mask is causal, and level off elsewhere.
        counted = np.array(self.area_lengths, dtype=np.float64)
        per_query = np.array(self.area_pairs) / counted
        keys = np.interp(n, counted, per_query)
        slope = (per_query[-1] - per_query[-2]) / (counted[-1] - counted[-2])
        keys = np.where(n > counted[-1], per_query[-1] + slope * (n - counted[-1]), keys)
        return np.asarray(n * np.minimum(keys, (n + 1) / 2), dtype=np.float64)

    def _ulysses_s_per_token(self, kind: GroupKind) -> float:
        shape, d = self.shape, kind.degree
        kv_heads = max(shape.num_kv_heads, min(d, shape.num_heads))
        elements = 2 * (shape.num_heads + kv_heads) * shape.head_dim
        passes = shape.forwards + 1
        sent = elements * shape.bytes_per_element * passes * shape.num_layers / d
        if not kind.crosses_nodes:
            return sent * (d - 1) / d / self.intra_node.bytes_per_s
        inside = min(self.devices_per_node, d)
        return max(
            sent * (inside - 1) / d / self.intra_node.bytes_per_s,
            sent * max(d - inside, 1) / d / self.inter_node.bytes_per_s,
        )

    def _ring_s_per_token(self, kind: GroupKind) -> float:
        shape, d = self.shape, kind.degree
        link = self.inter_node if kind.crosses_nodes else self.intra_node
        kv = 2 * shape.num_kv_heads * shape.head_dim
        sent = (
            kv * ((shape.attention_forwards + 1) * shape.bytes_per_element + 4) * shape.num_layers
        )
        return sent * (d - 1) / d / link.bytes_per_s
