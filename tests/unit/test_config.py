"""The configuration: round trip, overrides, and every refusal by its message."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_attn.config import Config, dump_config, load_cluster, load_config
from dist_attn.config_device import describe_loss
from dist_attn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "clusters").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_clusters_are_valid(path: Path) -> None:
    assert load_cluster(path).world_size > 0


def test_round_trip_with_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "run: {steps: 7}\nengine: {zero_stage: 3}\n")
    config = load_config(file, ["optimizer.lr=0.5", "data.batch={documents: 3}"])
    assert (config.run.steps, config.engine.zero_stage) == (7, 3)
    assert (config.optimizer.lr, config.data.batch.documents) == (0.5, 3)
    assert load_config(write(tmp_path / "b.yaml", dump_config(config))) == config


def test_auto_dtype() -> None:
    config = Config()
    assert config.on("cpu").model.dtype == "fp32"
    assert config.on("cuda").model.dtype == "bf16"
    with pytest.raises(ConfigError, match=r"zero_stage 0 with model.dtype bf16"):
        Config(engine={"zero_stage": 0}).on("cuda")


def test_cluster_file_beside_the_configuration(tmp_path: Path) -> None:
    nodes = "nodes: [{count: 2, devices_per_node: 3, device: cpu}]"
    write(tmp_path / "c.yaml", nodes)
    config = load_config(write(tmp_path / "a.yaml", "cluster: c.yaml"))
    assert config.cluster.world_size == 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: {stepz: 3}", "run.stepz: unknown key; did you mean 'steps'?"),
        ("planer: {}", "planer: unknown key; did you mean 'planner'?"),
        ("run: {steps: many}", "run.steps: .*integer, got str 'many'"),
        ("run: {steps: 0}", "run.steps: .*greater than 0, got int 0"),
        ("run: {steps: 1.5}", "run.steps: .*got float 1.5"),
        ("engine: {zero_stage: 4}", "engine.zero_stage: .*0, 1, 2 or 3, got int 4"),
        (
            "attention: {strategies: [rings]}",
            "strategies.0: .*or 'ulysses.ulysses'",
        ),
        ("attention: {inner_degree: 2}", "inner_degree 2 is for strategies in two levels"),
        ("attention: {inner_degree: 1}", "attention.inner_degree: .*greater than or equal to 2"),
        ("attention: {ring_layout: spiral}", "ring_layout: .*'striped' or 'contiguous'"),
        ("attention: {strategies: []}", "attention.strategies: .*at least 1"),
        ("model: {num_heads: 4, num_kv_heads: 3}", "num_heads must be a multiple"),
        ("data: {batch: {tokens: 10, documents: 3}}", "exactly one of"),
        ("data: {corpus: {kind: jsonl}}", "kind 'jsonl' needs a path"),
        ("data: {corpus: {kind: stdlib, path: x}}", "takes no path"),
        ("data: {batch: {tokens: 100}}", "less than data.max_document_tokens"),
        ("planner: {static_degree: 2}", "static_degree goes with mode 'static'"),
        ("planner: {synchronisation: step}", "zero_stage 2 all ranks must meet in every backward"),
        (
            "planner: {placement: free}\nattention: {strategies: [ring, ulysses+ring]}",
            "strategies in one level",
        ),
        (
            "planner: {synchronisation: step, placement: free}\nengine: {zero_stage: 1}",
            "use placement 'groups' with 'step'",
        ),
        ("planner: {max_tokens_per_device: {cpu: 0}}", "max_tokens_per_device.cpu: .*greater"),
        ("engine: {zero_stage: 0}\nmodel: {dtype: bf16}", "accumulates gradients in bf16"),
        ("cluster: {nodes: []}", "cluster.nodes: .*at least 1"),
        ("cluster: nowhere.yaml", "cannot read nowhere.yaml"),
        ("run: [1, 2]", "run: .*got list"),
        ("- 1\n- 2", "must hold a mapping of keys, got list"),
        ("run: {steps: 3", "is not valid YAML"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.steps", "key.path=value"),
        ("run.stepz=3", "unknown key"),
        ("run.steps.deeper=3", "has no keys below"),
        ("run.steps=[", "not a YAML value"),
    ],
)
def test_override_refusals(tmp_path: Path, override: str, says: str) -> None:
    file = write(tmp_path / "a.yaml", "run: {steps: 7}")
    with pytest.raises(ConfigError, match=says):
        load_config(file, [override])


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "bad.yaml")


def test_the_loss_is_liger_where_it_can_be_had() -> None:
    def decided(device: str, installed: bool, **more: Any) -> tuple[str, str]:
        found = None if not installed else object()
        with mock.patch("dist_attn.config_device.find_spec", return_value=found):
            config = Config(**{"engine": {}, **more}).on(device)
            return config.model.loss, describe_loss(config.model, config.engine, device)

    megatron = {"name": "megatron"}
    two = {"name": "megatron", "tensor_parallel_degree": 2}
    assert decided("cuda", True)[0] == "liger"
    assert decided("cuda", True, engine=megatron)[0] == "liger"
    for device, installed, engine, why in (
        ("cpu", True, {}, "run on GPUs, not on cpu"),
        ("cuda", False, {}, "pip install liger-kernel"),
        ("cuda", True, two, "tensor_parallel_degree 2"),
    ):
        loss, said = decided(device, installed, engine=engine)
        assert loss == "torch"
        assert why in said
    assert decided("cuda", True, model={"loss": "torch"}) == (
        "torch", "loss: torch's operations, 1,024 tokens at a time (model.loss is 'torch')",
    )  # fmt: skip
    for model, engine, says in (
        ({"loss": "liger"}, two, r"model.loss 'liger': .* lie on several ranks"),
        ({"kernels": "liger"}, megatron, r"model.kernels 'liger': engine 'megatron' computes"),
    ):
        with pytest.raises(ConfigError, match=says):
            Config(model=model, engine=engine).on("cuda")
    # Planning elsewhere than where it is installed is no fault.
    assert decided("cuda", False, model={"loss": "liger"})[0] == "liger"
