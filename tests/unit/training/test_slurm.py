"""SLURM's words in torch's."""

from __future__ import annotations

import pytest

from dist_attn.errors import ConfigError
from dist_attn.training.slurm import adopt_task, first_host, place_of_node, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "MASTER_ADDR": "10.0.0.1",
}


def task(rank: int, node: int, local: int, **more: str) -> dict[str, str]:
    place = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    return STEP | place | more


def test_each_task_becomes_the_rank_of_its_number() -> None:
    port = None
    for rank, node, local, count in [(0, 0, 0, 2), (1, 0, 1, 2), (3, 1, 1, 2), (4, 2, 0, 1)]:
        environ = task(rank, node, local)
        assert adopt_task(environ)
        assert environ["RANK"] == str(rank)
        assert environ["WORLD_SIZE"] == "5"
        assert environ["LOCAL_RANK"] == str(local)
        assert environ["LOCAL_WORLD_SIZE"] == str(count)
        assert environ["MASTER_ADDR"] == "10.0.0.1"
        assert port in (None, environ["MASTER_PORT"])
        port = environ["MASTER_PORT"]
    next_step = task(0, 0, 0, SLURM_STEP_ID="4")
    adopt_task(next_step)
    assert next_step["MASTER_PORT"] != port


def test_ranks_of_one_node_meet_on_the_loopback_interface() -> None:
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "5"}
    environ = task(1, 0, 1, **one_node)
    del environ["MASTER_ADDR"]
    told = dict(environ, MASTER_ADDR="10.0.0.1")
    assert adopt_task(environ)
    assert (environ["MASTER_ADDR"], environ["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")
    assert adopt_task(told)
    assert told["MASTER_ADDR"] == "10.0.0.1"
    assert "GLOO_SOCKET_IFNAME" not in told


def test_what_is_no_rank_is_left_alone() -> None:
    single = task(0, 0, 0, SLURM_STEP_NUM_TASKS="1")
    batch_script = {k: v for k, v in task(0, 0, 0).items() if "STEP" not in k}
    torchrun = task(0, 0, 0, RANK="7")
    for environ in (single, batch_script, torchrun, {}):
        before = dict(environ)
        assert not adopt_task(environ)
        assert environ == before


def test_tasks_dealt_out_in_turn_are_refused() -> None:
    with pytest.raises(ConfigError, match="--distribution=block"):
        adopt_task(task(1, 1, 0))


def test_launchers_one_per_node() -> None:
    place = place_of_node(task(2, 2, 0, SLURM_STEP_NUM_TASKS="3", MASTER_PORT="1234"))
    assert place is not None
    assert (place.node_rank, place.num_nodes) == (2, 3)
    assert (place.master_addr, place.master_port) == ("10.0.0.1", 1234)
    assert place_of_node({}) is None
    with pytest.raises(ConfigError, match="5 tasks on 3 nodes"):
        place_of_node(task(0, 0, 0))


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),1", [4, 4, 1]), ("1,2(x3)", [1, 2, 2, 2])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("a-b2,c", "a-b2"),
        ("rack[1-2]n[4-8]", "rack1n4"),
        ("n[05-06]-ib0,m1", "n05-ib0"),
    ],
)
def test_first_host(text: str, name: str) -> None:
    assert first_host(text) == name
