"""The measuring half of calibration, on real ranks; and that plans read what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_attn.config import Config, load_config
from dist_attn.errors import ConfigError
from dist_attn.planner.calibration import Calibration
from dist_attn.planner.cluster import local_cluster
from dist_attn.planner.costs import GroupKind
from dist_attn.planner.fitting import cost_model
from dist_attn.planner.shape import ModelShape
from dist_attn.training.calibrate import Extent, measure
from dist_attn.training.calibrate_links import group_sets
from dist_attn.training.runtime import Runtime
from tests.ranks import run_ranks

MODEL = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 6, "dtype": "fp32"}


def run_calibration(out: str) -> Calibration:
    rank, size = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(rank, size, rank, size, torch.device("cpu"))
    config = Config(model=MODEL, attention={"strategies": ["ring", "ulysses", "gather"]})
    return measure(config, Path(out), Extent(max_tokens=256, repeats=1), runtime)


@pytest.mark.slow
def test_a_machine_is_measured_and_planned_with(tmp_path: Path) -> None:
    out = tmp_path / "cpu.yaml"
    made = run_ranks(run_calibration, 2, str(out), timeout_s=250)
    assert made[0].compute == made[1].compute
    read = Calibration.load(out)
    assert read == made[0]
    assert read.device == "cpu"
    assert read.model["num_layers"] == 6
    # Attention and the rest both cost something, and a token no less than its arithmetic at 1 TF.
    _, linear, _ = read.compute.coefficients
    shape = ModelShape.from_config(Config(model=MODEL).model)
    assert linear > 6 * shape.matrix_parameters / 1e12
    latency, per_byte = read.intra_node.coefficients
    assert 0 < latency < 0.1
    assert 1e-12 < per_byte < 1e-5
    assert read.memory is None
    assert {c.strategy for c in read.checks} == {"ring", "ulysses", "gather"}
    assert all(c.measured_s > 0 and c.predicted_s > 0 for c in read.checks)

    (tmp_path / "run.yaml").write_text("cost: {calibrations: [cpu.yaml]}\n")
    config = load_config(tmp_path / "run.yaml").model_copy(
        update={"model": Config(model=MODEL).model}
    )
    cluster = local_cluster(2, ["cpu"] * 2, 2)
    cost = cost_model(config, cluster, shape, None, 1000)
    one, n = GroupKind(1, "local"), np.array([700])
    _, linear, pair = read.compute.coefficients
    assert cost.compute_s(one, n)[0] == pytest.approx(linear * 700 + pair * 700 * 701 / 2)
    other = ModelShape.from_config(Config(model={**MODEL, "num_layers": 2}).model)
    with pytest.raises(ConfigError, match="another model: num_layers 6 there, 2 here"):
        cost_model(config, cluster, other, None, 1000)


def test_groups_inside_nodes_and_across() -> None:
    sets = group_sets(Runtime(0, 8, 0, 4, torch.device("cpu")))
    assert sets[2, False] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert sets[2, True] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert sets[8, True] == [tuple(range(8))]
    assert (8, False) not in sets
    assert set(group_sets(Runtime(0, 3, 0, 3, torch.device("cpu")))) == {(2, False), (3, False)}
