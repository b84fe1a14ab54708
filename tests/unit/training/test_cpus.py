"""How the CPUs of a node are dealt out to its ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_attn.training import cpus
from dist_attn.training.cpus import bind_cpus, parse_list, share_out
from tests.ranks import run_ranks

#: Two sockets of four cores, two threads to a core: CPU c and c + 8 are one core.
CORES = [frozenset({c, c + 8}) for c in range(8)]
ALL = frozenset(range(16))
LEFT, RIGHT = parse_list("0-3,8-11"), parse_list("4-7,12-15")


def test_each_rank_gets_whole_cores_near_its_gpu() -> None:
    shares = share_out([ALL] * 4, [RIGHT, LEFT, RIGHT, LEFT], CORES)
    assert shares == [{4, 5, 12, 13}, {0, 1, 8, 9}, {6, 7, 14, 15}, {2, 3, 10, 11}]
    # Where the place of any GPU is not known, and where a job has a part of the node.
    assert share_out([ALL] * 2, [RIGHT, frozenset()], CORES) == [LEFT, RIGHT]
    assert share_out([LEFT] * 2, [LEFT] * 2, CORES) == [{0, 1, 8, 9}, {2, 3, 10, 11}]


@pytest.mark.parametrize(
    ("seen", "near"),
    [
        ([LEFT, RIGHT], [LEFT, RIGHT]),  # bound by somebody else
        ([ALL], [LEFT]),  # alone
        ([frozenset({0, 8})] * 2, [frozenset()] * 2),  # fewer cores than ranks
    ],
)
def test_others_are_left_alone(seen: list[frozenset[int]], near: list[frozenset[int]]) -> None:
    assert share_out(seen, near, CORES) is None


def test_lists_and_cores_of_the_kernel(tmp_path: Path) -> None:
    assert parse_list("0-2,8\n") == {0, 1, 2, 8}
    assert parse_list("\n") == frozenset()
    for cpu in range(4):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert cpus._cores({0, 1, 2, 3}, tmp_path) == [{0, 2}, {1, 3}]
    assert cpus._cores({1, 2, 3}, tmp_path) == [{1, 3}, {2}]
    assert cpus._cores({5, 6}, tmp_path) == [{5}, {6}]


def bound(folder: str) -> tuple[list[int], list[int]]:
    """What a rank may run on afterwards, by its main thread and by one that was there before."""
    rank, store = dist.get_rank(), dist.FileStore(f"{folder}/store", 2)
    bind_cpus(store, rank, rank, 2, torch.device("cpu"))
    threads = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
    return sorted(os.sched_getaffinity(0)), sorted(frozenset[int]().union(*threads))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_live_ranks_keep_to_their_shares(tmp_path: Path) -> None:
    one, two = run_ranks(bound, 2, str(tmp_path), fresh=True)
    assert one[0] == one[1]
    assert two[0] == two[1]
    assert not set(one[0]) & set(two[0])
    assert set(one[0]) | set(two[0]) <= os.sched_getaffinity(0)
