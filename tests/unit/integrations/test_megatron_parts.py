"""The parts of the Megatron engine that need no process group."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_attn import integrations
from dist_attn.config import Config, ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.hf import build_model
from dist_attn.integrations.megatron import (
    DistAttention,
    ExplicitRotary,
    PackedContext,
    RecomputedLayer,
    make_layer_spec,
)
from dist_attn.integrations.megatron_model import check_model
from dist_attn.integrations.megatron_weights import Block, _cut
from dist_attn.integrations.recompute import Recompute
from dist_attn.integrations.rotary import Frequencies
from dist_attn.planner.cluster import Cluster, local_cluster
from dist_attn.planner.cost import CostModel
from dist_attn.planner.memory import MemoryModel, Sharding
from dist_attn.planner.shape import ModelShape
from dist_attn.planner.tensor_parallel import tensor_parallel_cluster, tensor_parallel_shape
from dist_attn.training.topology import Topology

INTEGRATIONS = Path(integrations.__file__).parent


def imported_by(path: Path) -> set[str]:
    """Names of all modules that a file imports, functions' imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return names


@pytest.mark.parametrize("path", sorted(INTEGRATIONS.glob("*.py")), ids=lambda p: p.name)
def test_no_engine_imports_the_other(path: Path) -> None:
    of_megatron = path.name.startswith("megatron")
    foreign = ("deepspeed", "dist_attn.integrations.deepspeed")
    if not of_megatron:
        foreign = ("megatron", "dist_attn.integrations.megatron")
    assert not [name for name in imported_by(path) if name.startswith(foreign)]


def test_imports_are_seen() -> None:
    assert "megatron.core.distributed" in imported_by(INTEGRATIONS / "megatron_shards.py")
    assert "deepspeed" in imported_by(INTEGRATIONS / "deepspeed_engine.py")


def inverse_frequencies(dim: int, base: float = 10000.0) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def test_angles_are_right_at_a_million() -> None:
    frequencies = inverse_frequencies(128)
    positions = torch.tensor([[0, 1, 4095, 999_999, 1_000_000]])
    angles = ExplicitRotary(Frequencies(frequencies.double()))((positions, None))
    assert angles.shape == (5, 1, 1, 128)
    assert angles.dtype == torch.float32
    exact = positions[0].double()[:, None] * frequencies.double()
    exact = torch.cat((exact, exact), -1)
    for function in (torch.cos, torch.sin):
        error = (function(angles[:, 0, 0]) - function(exact)).abs().max()
        assert error < 1e-6
    # The control: float32 products, as the stock embedding takes them, are far off there.
    stock = torch.outer(positions[0].float(), frequencies)
    assert (stock.cos() - exact[:, :64].cos()).abs().max() > 1e-3


def test_rotary_survives_a_cast_of_the_model() -> None:
    rotary = ExplicitRotary(Frequencies(inverse_frequencies(8).double()))
    places = torch.tensor([[77]]), None
    before = rotary(places)
    assert torch.equal(rotary.to(torch.bfloat16)(places), before)


def test_interleaved_angles() -> None:
    positions = torch.tensor([[3, 5]])
    halves = ExplicitRotary(Frequencies(inverse_frequencies(8).double()))((positions, None))
    pairs = ExplicitRotary(Frequencies(inverse_frequencies(8)), interleaved=True)((positions, None))
    assert torch.equal(pairs[..., ::2], halves[..., :4])
    assert torch.equal(pairs[..., 1::2], halves[..., :4])


def transformer_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    return TransformerConfig(**(sizes | {"attention_dropout": 0.0} | changes))


def test_what_attention_refuses() -> None:
    attention = DistAttention(transformer_config())
    q = torch.zeros(3, 1, 2, 8)
    with pytest.raises(ValueError, match="got NoneType"):
        attention(q, q, q, None)
    with pytest.raises(ValueError, match="needs packed_seq_params"):
        attention(q, q, q, None, packed_seq_params=PackedContext())
    with pytest.raises(ValueError, match="no attention_mask"):
        attention(q, q, q, torch.ones(1))
    two = torch.zeros(3, 2, 2, 8)
    with pytest.raises(ValueError, match="micro-batch size 1, got 2"):
        attention(two, two, two, None)
    with pytest.raises(ConfigError, match="no attention dropout"):
        DistAttention(transformer_config(attention_dropout=0.1))
    with pytest.raises(ConfigError, match="window_size"):
        DistAttention(transformer_config(window_size=(4, 0)))


def test_specs() -> None:
    plain, recomputed = make_layer_spec(), make_layer_spec(recompute=Recompute(True))
    assert plain.submodules.self_attention.submodules.core_attention is DistAttention
    assert recomputed.module is RecomputedLayer
    assert plain.module is not RecomputedLayer


def test_ranges_of_a_cut_matrix() -> None:
    # Columns 4 to 6 of a matrix of 9 columns; local rows are 3 wide.
    block = Block("w", (5, 9), 0, 5, col=4)
    parts = list(_cut(block, 3, 2, 11))
    whole = torch.arange(45).view(5, 9)
    local = whole[:, 4:7].reshape(-1)
    for part in parts:
        run = part.run or part.numel
        view = whole.reshape(-1).as_strided((part.numel // run, run), (9, 1), part.start)
        expected = local[part.local_start : part.local_start + part.numel]
        assert torch.equal(view.reshape(-1), expected)
    assert [(p.local_start, p.numel, p.run) for p in parts] == [
        (2, 1, None),
        (3, 6, 3),
        (9, 2, None),
    ]
    whole_rows = list(_cut(Block("w", (5, 3), 2, 3, 1), 3, 7, 12))
    assert [(p.start, p.numel, p.run) for p in whole_rows] == [(4, 5, None)]


def test_topology() -> None:
    topology = Topology(world_size=8, rank=5, tensor_parallel_degree=2)
    assert (topology.plan_world_size, topology.plan_rank, topology.tensor_rank) == (4, 2, 1)
    assert topology.members((0, 2, 3)) == (1, 5, 7)
    assert topology.everyone((0, 2)) == [(0, 4), (1, 5)]
    with pytest.raises(ConfigError, match="does not divide the 9 ranks"):
        Topology(9, 0, 2)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_planner_sees_a_share_of_the_model(recompute: bool) -> None:
    config = ModelConfig(
        hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=4, vocab_size=1001,
        gradient_checkpointing=recompute, dtype="bf16",
    )  # fmt: skip
    whole = ModelShape.from_config(config)
    share = tensor_parallel_shape(whole, 4)
    assert (share.num_heads, share.num_kv_heads, share.vocab_size) == (2, 1, 251)
    # The vocabulary's 1001 rows make four shares of 251.
    assert 4 * share.matrix_parameters - whole.matrix_parameters == 3 * 512
    parts = [MemoryModel.of(s, 4, Sharding(1)) for s in (share, whole)]
    assert parts[0].fullest(1000).bytes_per_token < parts[1].fullest(1000).bytes_per_token
    assert parts[0].static_bytes < parts[1].static_bytes
    devices = local_cluster(16, ["NVIDIA H100 80GB HBM3"] * 16, 8)
    cluster = tensor_parallel_cluster(devices, share, 4)
    assert (cluster.world_size, cluster.num_nodes) == (4, 2)
    cost = CostModel.derive(share, cluster, 1)
    flops = (8 if recompute else 6) * share.matrix_parameters
    # Sums of the residual stream: 2 * 3/4 of 512 bf16 elements, twice per layer and pass.
    sums_s = (3 if recompute else 2) * 2 * 2 * 1.5 * 512 * 2 / devices.intra_node.bytes_per_s
    alone_s = flops / devices.devices[0].linear_flops_per_s
    assert cost.devices[0].linear_s_per_token == pytest.approx(alone_s + sums_s)
    assert tensor_parallel_cluster(devices, whole, 1) is devices


def test_neighbours_on_two_nodes_are_refused() -> None:
    share = ModelShape.from_config(ModelConfig(vocab_size=256))
    three: Cluster = local_cluster(6, ["cpu"] * 6, 3)
    with pytest.raises(ConfigError, match="ranks 2 to 3 are not 2 equal devices of one node"):
        tensor_parallel_cluster(three, share, 2)


@pytest.mark.parametrize(
    ("engine", "model", "says"),
    [
        ({"name": "megatron", "zero_stage": 2}, {}, "zero_stage 1, got 2; leave zero_stage out"),
        ({"tensor_parallel_degree": 2}, {}, "tensor_parallel_degree 2 needs name 'megatron'"),
        (
            {"name": "megatron", "tensor_parallel_degree": 4},
            {"num_heads": 8, "num_kv_heads": 2},
            "4 does not divide model.num_kv_heads 2",
        ),
        (
            {"name": "megatron", "tensor_parallel_degree": 2},
            {"intermediate_size": 175},
            "does not divide model.intermediate_size 175",
        ),
    ],
)
def test_configurations_that_cannot_be(
    engine: dict[str, Any], model: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Config(engine=engine, model=ModelConfig(**model))


def test_megatron_is_stage_one() -> None:
    assert Config(engine={"name": "megatron"}).engine.zero_stage == 1
    assert Config().engine.zero_stage == 2


def test_models_that_are_no_llama_are_refused() -> None:
    model = build_model(ModelConfig(dtype="fp32", vocab_size=64), 64, seed=0)
    check_model(model, 2)
    with pytest.raises(ConfigError, match="does not divide num_key_value_heads 2"):
        check_model(model, 4)
    model.hf_config.model_type = "qwen3"
    with pytest.raises(ConfigError, match="'qwen3'; engine 'megatron' supports llama, mistral"):
        check_model(model, 1)
