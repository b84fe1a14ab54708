from __future__ import annotations

import numpy as np
import pytest

from dist_attn.config_masks import LayerMaskConfig
from dist_attn.errors import ConfigError, PlanError
from dist_attn.masks.layers import layer_rules, mean_area
from dist_attn.planner.cluster import Cluster, local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.flexsp import FlexSPCost
from dist_attn.planner.memory import MemoryModel, Sharding
from tests.unit.planner.conftest import make_cluster, make_shape


def test_parameters_of_a_known_model():
    llama = make_shape(
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    # The published Llama 3 8B.
    assert llama.num_parameters == 8_030_261_248


def test_work_is_the_causal_area_not_the_square(sixteen):
    _, cost = sixteen
    one = GroupKind(1, "local")
    lengths = np.array([1000, 2000], dtype=np.int64)
    linear = cost.devices[0].linear_s_per_token
    pair = cost.devices[0].attention_s_per_pair
    expected = linear * lengths + pair * lengths * (lengths + 1) / 2
    assert np.allclose(cost.compute_s(one, lengths), expected, rtol=1e-12)
    # The control: a square would be nearly twice as much attention.
    assert not np.allclose(
        cost.compute_s(one, lengths), linear * lengths + pair * lengths**2, rtol=1e-3
    )


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_crossing_nodes_costs_more(sixteen, strategy):
    _, cost = sixteen
    lengths = np.array([777, 16384], dtype=np.int64)
    inside = GroupKind(8, strategy)
    across = GroupKind(8, strategy, crosses_nodes=True)
    assert (cost.communication_s(across, lengths) >= cost.communication_s(inside, lengths)).all()
    assert cost.communication_s(across, lengths)[0] > cost.communication_s(inside, lengths)[0]
    assert cost.fixed_s(across) > cost.fixed_s(inside)


def test_a_rank_alone_communicates_nothing(sixteen):
    _, cost = sixteen
    assert cost.communication_s(GroupKind(1, "local"), np.array([5, 500])).sum() == 0.0


def test_ulysses_needs_a_head_per_rank(sixteen):
    _, cost = sixteen
    assert cost.allows(GroupKind(16, "ulysses"))
    assert not cost.allows(GroupKind(17, "ulysses"))
    assert cost.allows(GroupKind(17, "ring"))


def test_recomputation_trades_seconds_for_tokens():
    cluster = make_cluster((1, 8, "h100-80gb"))
    plain, keeping, saving = (
        CostModel.derive(make_shape(num_layers=16, **change), cluster, 3)
        for change in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "keep_attention": False},
        )
    )
    lengths = np.array([4096], dtype=np.int64)
    one = GroupKind(1, "local")
    tokens = [c.tokens_per_device(0) for c in (plain, keeping, saving)]
    seconds = [c.compute_s(one, lengths)[0] for c in (plain, keeping, saving)]
    assert tokens[2] > 2 * tokens[0]
    assert tokens[0] < tokens[1] < tokens[2]
    assert seconds[2] > 1.2 * seconds[0]
    assert seconds[0] < seconds[1] < seconds[2]


def test_zero_stages_free_memory():
    # More parameters than ZeRO-3 lets be whole at a time.
    shape = make_shape(hidden_size=4096, intermediate_size=14336, num_layers=32)
    static = [MemoryModel.of(shape, 64, Sharding(s)).static_bytes for s in range(4)]
    assert static == sorted(static, reverse=True)
    assert len(set(static)) == 4


def test_caps_by_kind_of_device():
    cluster = make_cluster((1, 4, "h100-80gb"), (1, 4, "a100-40gb"))
    cost = CostModel.derive(make_shape(), cluster, 2, {"a100-40gb": 100})
    assert cost.tokens_per_device(1) == 100
    assert cost.tokens_per_device(0) > 10_000
    assert cost.tokens_per_device(-1) == 100


def test_a_model_that_fills_the_memory_is_refused():
    cluster = make_cluster((1, 2, "a100-40gb"))
    shape = make_shape(hidden_size=8192, intermediate_size=28672, num_layers=80)
    with pytest.raises(PlanError, match="higher ZeRO stage"):
        CostModel.derive(shape, cluster, 0).tokens_per_device(0)


def test_local_cluster_reads_driver_names():
    cluster = local_cluster(4, ["NVIDIA H100 80GB HBM3"] * 4, 2)
    assert cluster.devices[0].name == "h100-80gb"
    assert cluster.node_of == (0, 0, 1, 1)
    with pytest.raises(ConfigError, match="no spec sheet for device 'Voodoo'"):
        local_cluster(1, ["Voodoo"], 1)
    with pytest.raises(ConfigError, match="one device name per rank"):
        local_cluster(3, ["cpu"] * 3, 2)


def test_fingerprints_tell_clusters_and_costs_apart(four):
    cluster, cost = four
    other = local_cluster(2, ["cpu"] * 2, 2)
    assert cluster.fingerprint() == local_cluster(4, ["cpu"] * 4, 4).fingerprint()
    assert cluster.fingerprint() != other.fingerprint()
    assert cost.fingerprint() != CostModel.derive(make_shape(), cluster, 2, 2049).fingerprint()


def test_flexsp_costs_follow_their_formula():
    record = {
        "device_token_capacity": 6449,
        "costmodel": {
            "hidden_size": 4096,
            "layer_num": 32,
            "act_per_token": 4.48,
            "cpt_alpha1": 5.128e-6,
            "cpt_alpha2": 0.1839576,
            "cpt_beta1": 629.3563,
            "alltoall_bandwidth_dict_gbs": {"1": 1e10, "2": 119.54, "4": 104.07, "16": 10.33},
        },
    }
    cost = FlexSPCost.from_record(record)
    kind = GroupKind(4, "ulysses")
    s = 10_000
    total_ms = 1e3 * float(
        cost.fixed_s(kind)
        + (cost.compute_s(kind, np.array([s])) + cost.communication_s(kind, np.array([s])))[0]
    )
    compute = (5.128e-6 * s * s + 0.1839576 * s) / 4
    exchange = 8 * 32 * 4096 * s * 2 / 2**20 / 4 / 104.07
    assert total_ms == pytest.approx(629.3563 + compute + exchange, rel=1e-12)
    assert not cost.allows(GroupKind(1, "local"))
    # Between two listed degrees the slower bandwidth counts.
    assert cost.bandwidth(5) == 10.33


def test_pools_are_ranks_of_one_kind_by_node():
    cluster = make_cluster((2, 2, "h100-80gb"), (1, 3, "a100-40gb"))
    assert cluster.pools == (((0, 1), (2, 3)), ((4, 5, 6),))
    assert cluster.spans_nodes((1, 2))
    assert not cluster.spans_nodes((4, 6))
    assert isinstance(cluster, Cluster)


def test_gather_costs_what_masks_let_a_rank_see():
    """A window's keys do not grow with the document; those of a causal one do, as in a ring."""
    cluster = make_cluster((2, 8, "h100-80gb"))
    shape = make_shape(num_layers=2)
    window = LayerMaskConfig(kind="window", window_tokens=1000)
    rules = layer_rules([window], shape.num_layers, shape.num_heads, shape.num_kv_heads)
    dense = CostModel.derive(shape, cluster, 3)
    sparse = CostModel.derive(shape, cluster, 3, areas=mean_area(rules, 64000))
    n = np.array([32000, 64000])
    for degree in (2, 8):
        ring, gather = GroupKind(degree, "ring"), GroupKind(degree, "gather")
        assert dense.exchange_s(gather, n) == pytest.approx(dense.exchange_s(ring, n))
        assert sparse.exchange_s(ring, n) == pytest.approx(dense.exchange_s(ring, n))
        # Two windows of 1,000 keys, of n (d - 1) / d.
        expected = 2000 / (n * (degree - 1) / degree) * dense.exchange_s(ring, n)
        assert sparse.exchange_s(gather, n) == pytest.approx(expected, rel=0.02)
