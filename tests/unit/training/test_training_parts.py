"""The parts of the loop that need no process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_attn.config import Config, OptimizerConfig, load_config
from dist_attn.errors import CheckpointError, ConfigError
from dist_attn.planner.plan import Group, MicroBatch, Plan, SolverReport
from dist_attn.training.checkpoint_files import find_checkpoint
from dist_attn.training.launcher import ranks_per_node
from dist_attn.training.metrics import describe_groups, imbalance
from dist_attn.training.run_folder import RunFolder, read_metrics
from dist_attn.training.runtime import choose_device
from dist_attn.training.schedule import learning_rate
from dist_attn.training.setup import check_identity, check_steps_left


def test_schedules() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="linear", min_lr_ratio=0.2)
    rates = [learning_rate(step, 14, config) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.2 + 0.8 * 0.5)
    assert rates[14] == pytest.approx(0.2)
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert learning_rate(9, 14, cosine) == pytest.approx(0.2 + 0.8 * 0.5)
    assert learning_rate(6, 14, cosine) > learning_rate(6, 14, config)
    constant = config.model_copy(update={"schedule": "constant"})
    assert learning_rate(13, 14, constant) == 1.0


def group(ranks: tuple[int, ...], strategy: str, documents: tuple[int, ...]) -> Group:
    return Group(ranks, strategy, documents, 1, 0.0, 0.0, 0.0, 0)


def test_groups_in_short() -> None:
    wide = MicroBatch((group((0, 1, 2, 3), "ring", (0,)),))
    mixed = MicroBatch(
        (group((0,), "local", (1,)), group((1,), "local", (2,)), group((2, 3), "ulysses", (3,)))
    )
    plan = Plan((9, 1, 1, 2), 4, (wide, mixed, wide), 1.0, 1.0, SolverReport("t"), "", "")
    assert describe_groups(plan) == "2x(4r) | 2u+2x1"


def test_imbalance() -> None:
    assert imbalance([[1.0, 3.0], [1.0, 1.0]]) == pytest.approx((1 + 3) / (1 + 2))
    assert imbalance([[0.0], [0.0]]) == 1.0


def test_run_folder(tmp_path: Path) -> None:
    config = Config()
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match="not seen here"):
        folder.check_visible()
    folder.create(config)
    folder.check_visible()
    assert load_config(folder.config) == config
    with pytest.raises(ConfigError, match="is not empty"):
        folder.create(config)
    lines = [json.dumps({"step": s, "loss": 0.1}) for s in range(5)]
    folder.metrics.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    folder.reopen(config, 3)
    assert [line["step"] for line in read_metrics(folder.metrics)] == [0, 1, 2]
    with pytest.raises(CheckpointError, match="holds no run"):
        RunFolder(tmp_path / "other").reopen(config, 3)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write"):
        RunFolder(tmp_path / "file" / "run").create(Config())


def test_identity_names_every_difference() -> None:
    path = Path("step-000001")
    check_identity(path, {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}})
    with pytest.raises(CheckpointError, match=r"b\.c: 2 there, 3 here; a: 1 there, 4 here"):
        check_identity(path, {"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "a": 4})
    with pytest.raises(CheckpointError, match=r"run\.steps=20"):
        check_steps_left(path, 10, 10)
    check_steps_left(path, 9, 10)


def test_missing_checkpoints_name_the_others(tmp_path: Path) -> None:
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"there are in .*: step-000002"):
        find_checkpoint(tmp_path, "step-000009")
    (tmp_path / "latest").write_text("step-000007\n")
    with pytest.raises(CheckpointError, match="names step-000007, which is gone"):
        find_checkpoint(tmp_path, "latest")


def test_ranks_and_devices() -> None:
    assert ranks_per_node(3) == 3
    assert ranks_per_node(None) >= 1
    with pytest.raises(ConfigError, match="positive number"):
        ranks_per_node(0)
    assert choose_device("cpu", 1).type == "cpu"
