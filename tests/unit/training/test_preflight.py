"""What the preflight makes of what the ranks found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dist_attn.config import ClusterConfig, Config, LinkConfig, NodesConfig
from dist_attn.errors import ConfigError
from dist_attn.planner.calibration import Calibration, Fit
from dist_attn.training.preflight import Findings, Limits, Promise, judge

GOOD = Findings(
    node="n1", device="NVIDIA H100", cpus=12, ranks_per_device=1.0, versions=(("torch", "2.13.0"),),
    config_hash="abc", free_gib=100.0, unwritable="", shared=True, clock_offset_s=0.001,
    tflops=600.0, intra_node_bytes_per_s=300e9, inter_node_bytes_per_s=40e9,
)  # fmt: skip
CLUSTER = ClusterConfig(
    nodes=[NodesConfig(count=3, devices_per_node=2, device="h100-80gb")],
    intra_node=LinkConfig(bandwidth_gb_per_s=360.0),
    inter_node=LinkConfig(bandwidth_gb_per_s=45.0),
)
PROMISE = Promise.of(Config(cluster=CLUSTER), None)
NO_PROMISE = Promise.of(Config(), None)


def six_ranks(bad: int | None = None, **changes: object) -> list[Findings]:
    everyone = [replace(GOOD, node=f"n{1 + rank // 2}") for rank in range(6)]
    if bad is not None:
        everyone[bad] = replace(everyone[bad], **changes)  # type: ignore[arg-type]
    return everyone


def test_good_nodes_pass() -> None:
    assert judge(six_ranks(), Limits(), CLUSTER, PROMISE) == []
    assert judge(six_ranks(3, intra_node_bytes_per_s=1.0), Limits(), None, NO_PROMISE) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"free_gib": 3.0}, "3.0 GiB free"),
        ({"unwritable": "Read-only file system"}, "Read-only"),
        ({"shared": False}, "shared file system"),
        ({"clock_offset_s": -7.5}, "-7.500 s off"),
        ({"ranks_per_device": 8.0}, "share a GPU"),
        ({"versions": (("torch", "2.11.0"),)}, "torch is 2.11.0, where most have 2.13.0"),
        ({"versions": ()}, "torch is None"),
        ({"config_hash": "xyz"}, "configuration is xyz"),
        ({"tflops": 400.0}, "400 TFLOP/s, others 600"),
        (
            {"intra_node_bytes_per_s": 100e9},
            "100.00 GB/s inside the node, the cluster promises 360",
        ),
        ({"inter_node_bytes_per_s": 5e9}, "5.00 GB/s to other nodes, the cluster promises 45"),
        ({"node": "n9"}, "the cluster puts it on node 1"),
    ],
)
def test_the_bad_node_is_named(changes: dict[str, object], words: str) -> None:
    complaints = judge(six_ranks(3, **changes), Limits(), CLUSTER, PROMISE)
    assert words in complaints[0].text
    assert complaints[0].node == changes.get("node", "n2")
    if "node" not in changes:
        assert len(complaints) == 1


def test_another_number_of_ranks_than_described() -> None:
    complaints = judge(six_ranks()[:4], Limits(), CLUSTER, PROMISE)
    assert "4 ranks came, the cluster describes 6" in complaints[0].text


def test_a_calibration_says_more_than_a_description(tmp_path: Path) -> None:
    file = tmp_path / "h100.yaml"
    # Inside a node 1 / 2.5e-12 = 400 GB/s; nothing was measured between nodes.
    fit = Fit((1e-5, 2.5e-12), 0.0, 0.0)
    Calibration("h100-80gb", Fit((0.0, 1.0, 1.0), 0.0, 0.0), intra_node=fit).save(file)
    promise = Promise.of(Config(cluster=CLUSTER), file)
    assert promise == Promise(str(file), pytest.approx(400e9), 45e9)
    slow = six_ranks(3, intra_node_bytes_per_s=190e9)
    assert judge(slow, Limits(), CLUSTER, PROMISE) == []
    (complaint,) = judge(slow, Limits(), None, Promise.of(Config(), file))
    assert complaint.node == "n2"
    assert f"190.00 GB/s inside the node, {file} promises 400.00" in complaint.text
    with pytest.raises(ConfigError, match="cannot read"):
        Promise.of(Config(), tmp_path / "none.yaml")
