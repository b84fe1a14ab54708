from __future__ import annotations

import pytest

from dist_attn.config import ClusterConfig, LinkConfig, NodesConfig
from dist_attn.planner.cluster import Cluster, local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.shape import ModelShape


def make_shape(**changes: object) -> ModelShape:
    sizes: dict = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 260,
        "bytes_per_element": 4,
    }
    return ModelShape(**{**sizes, **changes})


def make_cluster(*nodes: tuple[int, int, str], overhead_s: float = 0.01) -> Cluster:
    return Cluster.from_config(
        ClusterConfig(
            nodes=[NodesConfig(count=n, devices_per_node=d, device=k) for n, d, k in nodes],
            intra_node=LinkConfig(bandwidth_gb_per_s=200.0, latency_us=8.0),
            inter_node=LinkConfig(bandwidth_gb_per_s=20.0, latency_us=20.0),
            micro_batch_overhead_s=overhead_s,
        )
    )


@pytest.fixture
def four() -> tuple[Cluster, CostModel]:
    """Four CPU ranks of which each holds 2,048 tokens."""
    cluster = local_cluster(4, ["cpu"] * 4, 4)
    return cluster, CostModel.derive(make_shape(), cluster, 2, 2048)


@pytest.fixture
def sixteen() -> tuple[Cluster, CostModel]:
    """Two nodes of eight H100 and a model whose ranks hold 8,192 tokens."""
    cluster = make_cluster((2, 8, "h100-80gb"))
    shape = make_shape(
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=8,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        bytes_per_element=2,
    )
    return cluster, CostModel.derive(shape, cluster, 3, 8192)
