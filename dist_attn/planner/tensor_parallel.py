"""Tensor parallelism as the planner sees it: one of `degree` neighbours stands for all of them.

The neighbours hold the same tokens and do the same share of the work at the same time, so that the
time and memory of one are those of all.
"""

from __future__ import annotations

from dataclasses import replace

from dist_attn.errors import ConfigError
from dist_attn.planner.cluster import Cluster, Device
from dist_attn.planner.shape import ModelShape


def tensor_parallel_shape(shape: ModelShape, degree: int) -> ModelShape:
    """What one of `degree` devices holds of a model: a share of the heads, the MLP, the vocabulary.

    Residual stream and norms are whole on each.

    Raises:
        ConfigError: the degree does not divide the heads or the MLP.
    """
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
        if getattr(shape, name) % degree:
            raise ConfigError(
                f"engine.tensor_parallel_degree {degree} does not divide {name} "
                f"{getattr(shape, name)}; use a degree that divides it, and context parallelism "
                f"for the other ranks"
            )
    return replace(
        shape,
        num_heads=shape.num_heads // degree,
        num_kv_heads=shape.num_kv_heads // degree,
        intermediate_size=shape.intermediate_size // degree,
        vocab_size=-(-shape.vocab_size // degree),
    )


def tensor_parallel_cluster(cluster: Cluster, share: ModelShape, degree: int) -> Cluster:
    """The first of every `degree` devices, with a linear rate that pays for the sums over them.

    Each layer adds up the residual stream of its tokens twice in the forward and twice in the
    backward. A sum sends 2 (degree - 1) / degree of it, and hides behind nothing.

    Args:
        cluster: all devices.
        share: what one of them holds of the model.
        degree: devices that hold one model between them.

    Raises:
        ConfigError: neighbours would lie on different nodes or be of different kinds.
    """
    if degree == 1:
        return cluster
    firsts = range(0, cluster.world_size, degree)
    for first in firsts:
        neighbours = slice(first, first + degree)
        kinds = set(zip(cluster.node_of[neighbours], cluster.device_of[neighbours], strict=True))
        if len(kinds) > 1 or first + degree > cluster.world_size:
            raise ConfigError(
                f"engine.tensor_parallel_degree {degree}: ranks {first} to {first + degree - 1} "
                f"are not {degree} equal devices of one node; use a degree that divides the "
                f"devices of every node"
            )
    passes = 3 if share.gradient_checkpointing else 2
    sent = 2 * (degree - 1) / degree * share.hidden_size * share.bytes_per_element
    sums_s = passes * 2 * share.num_layers * sent / cluster.intra_node.bytes_per_s
    flops = 2 * (passes + 1) * share.matrix_parameters

    def slowed(device: Device) -> Device:
        rate = flops / (flops / device.linear_flops_per_s + sums_s)
        return replace(device, linear_flops_per_s=rate)

    return replace(
        cluster,
        node_of=tuple(cluster.node_of[r] for r in firsts),
        device_of=tuple(cluster.device_of[r] for r in firsts),
        devices=tuple(slowed(d) for d in cluster.devices),
    )
