"""What SLURM says about this process, translated once, at the entrance, into torch's words.

Everything behind the entrance knows RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, as torchrun sets them. Under `srun` there are two ways to come by them:

    srun, one task per rank          each task becomes the rank SLURM_PROCID (`adopt_task`)
    srun, one task per node, with    each task starts the ranks of its node, which meet at the first
    --nproc-per-node N               node (`place_of_node`)

Variables of torchrun win over SLURM's, and a MASTER_ADDR or MASTER_PORT that is set stays.
No torch here: the launcher and the command line import it.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dist_attn.errors import ConfigError

LOOPBACK = "127.0.0.1"
#: Ports that are derived from job and step, so that steps of one node do not collide.
_FIRST_PORT, _NUM_PORTS = 20000, 12000


@dataclass(frozen=True)
class NodePlace:
    """One of several nodes that start their own ranks."""

    node_rank: int
    num_nodes: int
    master_addr: str
    master_port: int


def adopt_task(environ: MutableMapping[str, str]) -> bool:
    """Set torch's rank variables of an srun task that is a rank; returns whether it is one.

    A step of one task is not: there `dist-attn train` starts the ranks of the node.

    Raises:
        ConfigError: the tasks are not dealt out as torch's ranks need it.
    """
    if "RANK" in environ or _step_tasks(environ) < 2:
        return False
    node = int(environ["SLURM_NODEID"])
    counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
    if rank != sum(counts[:node]) + local_rank:
        raise ConfigError(
            f"srun put task {rank} at place {local_rank} of node {node}, whose ranks begin at "
            f"{sum(counts[:node])}; number tasks node by node: srun --distribution=block"
        )
    if environ.get("SLURM_STEP_NUM_NODES") == "1" and "MASTER_ADDR" not in environ:
        # Nobody else need reach the ranks of one node, nor gloo's connections between them.
        environ["MASTER_ADDR"] = LOOPBACK
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address, port = _meeting_point(environ)
    environ.update(
        RANK=str(rank),
        WORLD_SIZE=environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(counts[node]),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    return True


def place_of_node(environ: Mapping[str, str]) -> NodePlace | None:
    """Where this process stands among launchers, one per node; None for a single node.

    Raises:
        ConfigError: srun started several launchers on a node.
    """
    tasks = _step_tasks(environ)
    if tasks < 2:
        return None
    nodes = int(environ["SLURM_STEP_NUM_NODES"])
    if tasks != nodes:
        raise ConfigError(
            f"--nproc-per-node starts a node's ranks, but srun started {tasks} tasks on {nodes} "
            f"nodes; start one task per node (--ntasks-per-node=1), or leave --nproc-per-node out "
            f"so that each task is a rank"
        )
    return NodePlace(int(environ["SLURM_NODEID"]), nodes, *_meeting_point(environ))


def node_name(environ: Mapping[str, str]) -> str:
    """The name of this node, as SLURM or the machine itself gives it."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form: `4(x2),1` is [4, 4, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE: cannot read {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first name of SLURM's short form: `gpu[007-009,012],login1` begins with gpu007."""
    first = re.match(r"[^,\[]+(?:\[[^\]]*\][^,\[]*)*", nodelist)
    if first is None:
        raise ConfigError(f"SLURM_STEP_NODELIST: cannot read {nodelist!r}")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def _step_tasks(environ: Mapping[str, str]) -> int:
    # A batch script outside of srun has no step.
    return int(environ.get("SLURM_STEP_NUM_TASKS", "0")) if "SLURM_STEP_ID" in environ else 0


def _meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which rank 0 listens, the same for every task of a step."""
    key = int(environ["SLURM_JOB_ID"]) * 8 + int(environ["SLURM_STEP_ID"])
    port = int(environ.get("MASTER_PORT") or _FIRST_PORT + key % _NUM_PORTS)
    address = environ.get("MASTER_ADDR")
    return address or _address(first_host(environ["SLURM_STEP_NODELIST"])), port


def _address(node: str) -> str:
    """The address that SLURM itself uses for a node, which its name need not resolve to."""
    try:
        command = ["scontrol", "-o", "show", "node", node]
        told = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return node  # Containers often lack scontrol; names resolve there.
    match = re.search(r"\bNodeAddr=(\S+)", told)
    return match[1] if match else node
