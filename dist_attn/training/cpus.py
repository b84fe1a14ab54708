"""CPUs for the ranks of a node that nobody bound: a share for each, near its GPU."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_SYSFS = Path("/sys")
Cpus = frozenset[int]


def bind_cpus(
    store: dist.Store, rank: int, local_rank: int, local_world_size: int, device: torch.device
) -> Cpus | None:
    """Keep this process to its share of the CPUs that all ranks of its node may run on.

    Ranks that may run on different CPUs were bound by srun or torchrun and are left alone, as are
    those of a node with fewer cores than ranks.

    Returns:
        The CPUs, if they changed.

    Collective: by all ranks of the node.
    """
    seen = os.sched_getaffinity(0)
    mine = {"seen": sorted(seen), "near": sorted(_near(device, _SYSFS))}
    store.set(f"cpus/{rank}", json.dumps(mine))
    first = rank - local_rank
    found = [json.loads(store.get(f"cpus/{r}")) for r in range(first, first + local_world_size)]
    shares = share_out(
        [frozenset(f["seen"]) for f in found],
        [frozenset(f["near"]) for f in found],
        _cores(seen, _SYSFS),
    )
    if shares is None:
        return None
    # Threads of this process keep what they were started with.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), shares[local_rank])
    logger.info("ranks of this node keep to CPUs %s", " | ".join(map(_short, shares)))
    return shares[local_rank]


def share_out(
    seen: Sequence[Cpus], near: Sequence[Cpus], cores: Sequence[Cpus]
) -> list[Cpus] | None:
    """Deal whole cores out to ranks; None where they are to stay as they are.

    Args:
        seen: CPUs that each rank may run on.
        near: CPUs close to each rank's GPU; empty where that is unknown.
        cores: CPUs of each core, in the machine's order.
    """
    if len(seen) < 2 or any(s != seen[0] for s in seen):
        return None
    wanted = [n & seen[0] for n in near]
    if not all(wanted):
        wanted = [seen[0]] * len(seen)
    result = []
    for rank, here in enumerate(wanted):
        rivals = [r for r, other in enumerate(wanted) if other == here]
        mine = [core & here for core in cores if core & here]
        place, count = rivals.index(rank), len(rivals)
        share = mine[place * len(mine) // count : (place + 1) * len(mine) // count]
        if not share:
            return None
        result.append(frozenset[int]().union(*share))
    return result


def _near(device: torch.device, sysfs: Path) -> Cpus:
    """CPUs of the NUMA node that a GPU hangs on; none for a CPU, or where the system hides it."""
    if device.type != "cuda":
        return frozenset()
    found: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
        return parse_list((sysfs / "bus/pci/devices" / address / "local_cpulist").read_text())
    except (AttributeError, OSError, ValueError):
        return frozenset()


def _cores(cpus: set[int], sysfs: Path) -> list[Cpus]:
    """The CPUs core by core: neighbours in number are often of different cores."""
    cores: dict[Cpus, None] = {}
    for cpu in sorted(cpus):
        siblings = sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores[parse_list(siblings.read_text()) & cpus] = None
        except (OSError, ValueError):
            cores[frozenset({cpu})] = None
    return list(cores)


def parse_list(text: str) -> Cpus:
    """Read the kernel's short form: `0-2,8` is 0, 1, 2 and 8."""
    result: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            result.update(range(int(first), int(last or first) + 1))
    return frozenset(result)


def _short(cpus: Cpus) -> str:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
