"""The preflight over live ranks of two nodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.config import load_config
from dist_attn.errors import NodeError
from dist_attn.training import links
from dist_attn.training.preflight import Findings, Limits, check_nodes
from dist_attn.training.runtime import Runtime
from tests.e2e.command import small_config
from tests.ranks import run_ranks

NODES = ("n1", "n1", "n2")
CLUSTER = (
    "cluster={nodes: [{count: 1, devices_per_node: 2, device: cpu}, "
    "{count: 1, devices_per_node: 1, device: cpu}], "
    "intra_node: {bandwidth_gb_per_s: RATE}, inter_node: {bandwidth_gb_per_s: RATE}}"
)


def fit(config: str, overrides: list[str], min_free_gib: float, late: int | None) -> object:
    """The findings of all ranks, or the refusal; the clock of rank `late` is an hour off."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        if rank == late:
            patch.setattr(links, "time", ClockAnHourAhead)
        runtime = Runtime(rank, size, 0, 1, torch.device("cpu"), None, NODES)
        try:
            return check_nodes(load_config(config, overrides), Limits(min_free_gib), runtime)
        except NodeError as error:
            return str(error)


class ClockAnHourAhead:
    perf_counter = staticmethod(time.perf_counter)

    @staticmethod
    def time() -> float:
        return time.time() + 3600.0


def test_fit_nodes_are_measured(tmp_path: Path) -> None:
    config = str(small_config(tmp_path))
    slow = CLUSTER.replace("RATE", "0.001")
    for found in run_ranks(fit, 3, config, [slow], 0.001, None):
        assert isinstance(found, list)
        assert [f.node for f in found] == list(NODES)
        assert all(isinstance(f, Findings) and f.shared and not f.unwritable for f in found)
        assert all(abs(f.clock_offset_s) < 0.1 for f in found)
        assert all(f.intra_node_bytes_per_s > 1e7 for f in found[:2])
        assert found[2].intra_node_bytes_per_s is None
        # One rank of each node has a partner on the other.
        assert [f.inter_node_bytes_per_s is None for f in found] == [False, True, False]
    assert not list(tmp_path.glob(".preflight-*"))


def test_unfit_nodes_are_named_on_every_rank(tmp_path: Path) -> None:
    config = str(small_config(tmp_path))
    assert run_ranks(fit, 3, config, [], 0.001, 2) == ["bad nodes: n2"] * 3
    fast = CLUSTER.replace("RATE", "1000000.0")
    assert run_ranks(fit, 3, config, [fast], 0.001, None) == ["bad nodes: n1,n2"] * 3
    assert run_ranks(fit, 3, config, [], 1e9, None) == ["bad nodes: n1,n2"] * 3
