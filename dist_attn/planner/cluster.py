"""The cluster as the planner sees it: ranks on nodes, kinds of devices, and links."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property

from dist_attn.config import ClusterConfig, DeviceConfig, LinkConfig, NodesConfig
from dist_attn.errors import ConfigError

GIB = 1 << 30

#: Dense bf16 matrix rates and memory of the makers' data sheets: NVIDIA A100 (312 TFLOP/s), H100
#: SXM and H200 SXM (989), B200 SXM (2,250). Memory in GiB is what the driver leaves of the nominal
#: size, rounded down. `cpu` is one of four ranks on two cores, fitted to measured steps of the
#: quickstart's model, whose matrices are too small for a higher rate.
SPEC_SHEETS: dict[str, DeviceConfig] = {
    "a100-40gb": DeviceConfig(peak_tflops=312.0, memory_gib=39.0),
    "a100-80gb": DeviceConfig(peak_tflops=312.0, memory_gib=79.0),
    "h100-80gb": DeviceConfig(peak_tflops=989.0, memory_gib=79.0),
    "h200-141gb": DeviceConfig(peak_tflops=989.0, memory_gib=140.0),
    "b200-192gb": DeviceConfig(peak_tflops=2250.0, memory_gib=178.0),
    "cpu": DeviceConfig(
        peak_tflops=0.04,
        linear_efficiency=0.3,
        attention_efficiency=0.85,
        memory_gib=2.0,
        reserved_gib=0.5,
    ),
}

_GPU_NAMES = (
    (r"A100.*40", "a100-40gb"),
    (r"A100.*80", "a100-80gb"),
    (r"H100", "h100-80gb"),
    (r"H200", "h200-141gb"),
    (r"B200", "b200-192gb"),
)
#: Orders of magnitude of gloo among ranks that share a few cores.
_CPU_LINK = LinkConfig(bandwidth_gb_per_s=0.5, latency_us=1000.0)


@dataclass(frozen=True)
class Device:
    """One kind of device, with the rates that are reached rather than the peak."""

    name: str
    linear_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes: int

    @classmethod
    def from_config(cls, name: str, config: DeviceConfig) -> Device:
        """Apply efficiencies and take off the reserved memory."""
        if config.reserved_gib >= config.memory_gib:
            raise ConfigError(
                f"device '{name}': reserved_gib ({config.reserved_gib}) leaves nothing of "
                f"memory_gib ({config.memory_gib}); lower the first"
            )
        peak = config.peak_tflops * 1e12
        return cls(
            name=name,
            linear_flops_per_s=peak * config.linear_efficiency,
            attention_flops_per_s=peak * config.attention_efficiency,
            memory_bytes=int((config.memory_gib - config.reserved_gib) * GIB),
        )


@dataclass(frozen=True)
class Link:
    """What one device sends per second while it receives as much, and what a message costs."""

    bytes_per_s: float
    latency_s: float

    @classmethod
    def from_config(cls, config: LinkConfig) -> Link:
        """Plain units instead of GB/s and microseconds."""
        return cls(config.bandwidth_gb_per_s * 1e9, config.latency_us * 1e-6)


@dataclass(frozen=True)
class Cluster:
    """Ranks 0 .. world_size - 1, node by node.

    A pool is all ranks of one kind of device; groups stay inside a pool where they can.
    """

    node_of: tuple[int, ...]
    devices: tuple[Device, ...]
    device_of: tuple[int, ...]
    intra_node: Link
    inter_node: Link
    micro_batch_overhead_s: float = 0.0
    ring_overlap: float = 0.9

    @classmethod
    def from_config(cls, config: ClusterConfig) -> Cluster:
        """Number the ranks of a description in the order of its nodes.

        Raises:
            ConfigError: a device name is neither a spec sheet's nor described.
        """
        known = {**SPEC_SHEETS, **config.devices}
        kinds: dict[str, int] = {}
        node_of: list[int] = []
        device_of: list[int] = []
        for nodes in config.nodes:
            if nodes.device not in known:
                raise ConfigError(
                    f"cluster.nodes: unknown device '{nodes.device}'; known are "
                    f"{', '.join(sorted(known))}; describe others under `devices`"
                )
            kind = kinds.setdefault(nodes.device, len(kinds))
            for _ in range(nodes.count):
                node = node_of[-1] + 1 if node_of else 0
                node_of += [node] * nodes.devices_per_node
                device_of += [kind] * nodes.devices_per_node
        return cls(
            node_of=tuple(node_of),
            devices=tuple(Device.from_config(name, known[name]) for name in kinds),
            device_of=tuple(device_of),
            intra_node=Link.from_config(config.intra_node),
            inter_node=Link.from_config(config.inter_node),
            micro_batch_overhead_s=config.micro_batch_overhead_s,
            ring_overlap=config.ring_overlap,
        )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.node_of)

    @cached_property
    def num_nodes(self) -> int:
        """Nodes in all."""
        return self.node_of[-1] + 1

    @cached_property
    def pools(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per kind of device, per node that has it: the ranks."""
        pools: list[dict[int, list[int]]] = [{} for _ in self.devices]
        for rank, (node, kind) in enumerate(zip(self.node_of, self.device_of, strict=True)):
            pools[kind].setdefault(node, []).append(rank)
        return tuple(tuple(tuple(ranks) for ranks in pool.values()) for pool in pools)

    def spans_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether a group of these ranks talks across nodes."""
        return len({self.node_of[r] for r in ranks}) > 1

    def fingerprint(self) -> str:
        """A short hash of everything a plan for this cluster depends on."""
        return fingerprint(asdict(self))


def local_cluster(world_size: int, device_names: list[str], devices_per_node: int) -> Cluster:
    """Describe the ranks that run, for `cluster: auto`.

    Args:
        world_size: ranks in all.
        device_names: one name per rank as the driver gives it, or `cpu`.
        devices_per_node: ranks of each node.

    Raises:
        ConfigError: a device has no spec sheet, or the counts do not fit.
    """
    if len(device_names) != world_size or world_size % devices_per_node:
        raise ConfigError(
            f"cluster 'auto' needs one device name per rank and whole nodes, got {world_size} "
            f"ranks, {len(device_names)} names and {devices_per_node} ranks per node; describe the "
            f"cluster in a file and name it under `cluster`"
        )
    nodes: list[NodesConfig] = []
    for first in range(0, world_size, devices_per_node):
        names = {_spec_name(n) for n in device_names[first : first + devices_per_node]}
        if len(names) > 1:
            raise ConfigError(
                f"cluster 'auto' takes nodes of one kind of device each, got {sorted(names)} on "
                f"the node of rank {first}; describe the cluster in a file and name it under "
                f"`cluster`"
            )
        nodes.append(NodesConfig(count=1, devices_per_node=devices_per_node, device=names.pop()))
    if all(n.device == "cpu" for n in nodes):
        config = ClusterConfig(
            nodes=nodes,
            intra_node=_CPU_LINK,
            inter_node=_CPU_LINK,
            ring_overlap=0.0,
            micro_batch_overhead_s=0.015,
        )
    else:
        config = ClusterConfig(nodes=nodes)
    return Cluster.from_config(config)


def fingerprint(data: object) -> str:
    """The first 16 hex digits of the SHA-256 of `data` as canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spec_name(name: str) -> str:
    if name in SPEC_SHEETS:
        return name
    for pattern, spec in _GPU_NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return spec
    raise ConfigError(
        f"cluster 'auto' has no spec sheet for device '{name}'; known are "
        f"{', '.join(sorted(SPEC_SHEETS))}; describe the cluster in a file and name it under "
        f"`cluster`"
    )
