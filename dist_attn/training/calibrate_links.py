"""Times of the exchanges that attention makes, per kind, group size and place."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_attn.comm.copied_all_to_all import copied_all_to_all
from dist_attn.comm.exchange import open_transport
from dist_attn.groups import CommGroup, GroupPool
from dist_attn.planner.calibration import TransferPoint
from dist_attn.training.runtime import Runtime

#: Bytes that a rank sends in one exchange, by the kind of device.
_SIZES = {
    "cpu": (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20),
    "cuda": (64 << 10, 1 << 20, 8 << 20, 32 << 20, 128 << 20),
}


@dataclass(frozen=True)
class LinkPoint:
    """One exchange of all groups of a size at once."""

    #: `all-to-all`, `ring` or `gather`.
    operation: str
    degree: int
    crosses_nodes: bool
    point: TransferPoint


def group_sets(runtime: Runtime) -> dict[tuple[int, bool], list[tuple[int, ...]]]:
    """Groups by size and whether they cross nodes: powers of two, and all ranks."""
    world, node = runtime.world_size, runtime.local_world_size
    sizes = sorted({1 << k for k in range(1, world.bit_length())} | {world})
    found: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
    for size in sizes:
        if size < 2 or size > world:
            continue
        if size <= node:
            found[size, False] = [
                tuple(range(n + first, n + first + size))
                for n in range(0, world, node)
                for first in range(0, node - size + 1, size)
            ]
        if world > node and world % size == 0:
            # Ranks as far apart as can be: the same place in different nodes first.
            step = world // size
            found[size, True] = [tuple(range(k, world, step)) for k in range(step)]
    return found


def measure_links(runtime: Runtime, pool: GroupPool, repeats: int) -> list[LinkPoint]:
    """Time every exchange; the slowest rank of each repeat counts, and the median of repeats.

    Collective: by all ranks.
    """
    points: list[LinkPoint] = []
    for (size, crosses), sets in group_sets(runtime).items():
        pool.ensure(sets)
        mine = next((s for s in sets if runtime.rank in s), None)
        group = None if mine is None else pool.get(mine)
        for num_bytes in _SIZES[runtime.device.type]:
            for operation, messages, share in (
                ("all-to-all", math.log2(size), (size - 1) / size),
                ("ring", 1.0, 1.0),
                ("gather", size - 1.0, (size - 1) / size),
            ):
                call = None
                if group is not None:
                    call = _call(operation, group, num_bytes, runtime.device)
                seconds = _median(call, runtime, repeats)
                point = TransferPoint(num_bytes * share, messages, seconds)
                points.append(LinkPoint(operation, size, crosses, point))
    return points


def _call(
    operation: str, group: CommGroup, num_bytes: int, device: torch.device
) -> Callable[[], None]:
    size, me = group.cp_size, group.cp_rank
    out = torch.zeros(num_bytes // size * size, dtype=torch.uint8, device=device)
    into = torch.empty_like(out)

    def all_to_all() -> None:
        # By copy engines where attention does so.
        if group.peers is None:
            dist.all_to_all_single(into, out, group=group.process_group)
            return
        outgoing = [[part] for part in out.view(size, -1)]
        targets = [[part] for part in into.view(size, -1)]
        copied_all_to_all(outgoing, targets, group, num_bytes // size)

    def exchange(parts: Sequence[torch.Tensor]) -> None:
        # As attention does it: from the rank t places before, to the rank t places behind.
        largest = max(part.nbytes for part in parts)
        transport = open_transport(group, None, {"kv": largest})
        for t, part in enumerate(parts, start=1):
            phase = transport.exchange()
            phase.send(part, me + t, "kv")
            phase.receive(tuple(part.shape), part, me - t, "kv")
            phase.start()
            phase.wait()

    def ring() -> None:
        exchange([out])

    parts = out.view(size, -1)[1:].unbind() if size > 1 else ()

    def gather() -> None:
        exchange(parts)

    return {"all-to-all": all_to_all, "ring": ring, "gather": gather}[operation]


def _median(call: Callable[[], None] | None, runtime: Runtime, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        runtime.barrier()
        begun = time.perf_counter()
        if call is not None:
            call()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        seconds.append(time.perf_counter() - begun)
    # The first of them connects.
    of_all: list[list[float]] = runtime.gather(seconds[1:])
    return statistics.median(max(row) for row in zip(*of_all, strict=True))
