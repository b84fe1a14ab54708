"""Small measurements among ranks: clocks, links, and the rate of a matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_attn.training.runtime import Runtime

#: Bytes that each rank sends at a time, by the kind of device: so many that latency does not count
#: (two H100s: 80 GB/s at 16 MiB, 272 at 128 MiB, 305 at 512 MiB).
_MESSAGE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_REPEATS = 3
#: Partners of each node; the best of them counts, so that a bad partner does not.
_SHIFTS = (1, 2, 3)


@dataclass(frozen=True)
class Rates:
    """Bytes per second that a rank sends while it receives as much; None without a neighbour."""

    intra_node: float | None
    inter_node: float | None


def exchange_bytes_per_s(nodes: tuple[str, ...], runtime: Runtime) -> Rates:
    """Send to the next rank of the node, and to the same place on up to three other nodes.

    All ranks send at once, as a step's exchange does.

    Collective: by all ranks, with the same `nodes`.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    mine = by_node[nodes[runtime.rank]]
    place = mine.index(runtime.rank)
    intra = None
    if max(len(ranks) for ranks in by_node.values()) > 1:
        ring = (mine[(place + 1) % len(mine)], mine[place - 1]) if len(mine) > 1 else None
        intra = _rate(ring, runtime)
    rows = list(by_node.values())
    row = rows.index(mine)
    rates = []
    for shift in _SHIFTS[: len(rows) - 1]:
        # Places that the smallest node lacks have no partners.
        fits = place < min(len(ranks) for ranks in rows)
        target, source = rows[(row + shift) % len(rows)], rows[row - shift]
        rates.append(_rate((target[place], source[place]) if fits else None, runtime))
    known = [r for r in rates if r is not None]
    return Rates(intra, max(known) if known else None)


def _rate(neighbours: tuple[int, int] | None, runtime: Runtime) -> float | None:
    """Bytes per second to the first and from the second rank; the fastest of some repeats."""
    size = _MESSAGE_BYTES[runtime.device.type]
    device = runtime.device if dist.get_backend() == "nccl" else torch.device("cpu")
    out, into = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS + 1):
        runtime.barrier()
        if neighbours is None:
            continue
        begun = time.perf_counter()
        operations = [
            dist.P2POp(dist.isend, out, neighbours[0]),
            dist.P2POp(dist.irecv, into, neighbours[1]),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first of them connects; it is hardly ever the fastest.
        best = min(best, time.perf_counter() - begun)
    return None if neighbours is None else size / best


def clock_offset_s(nodes: tuple[str, ...], runtime: Runtime, repeats: int = 5) -> float:
    """Seconds by which this node's clock is ahead of rank 0's, measured by the node's first rank.

    Numerics:
        The error is at most half of the fastest round trip, microseconds to a millisecond.

    Collective: by all ranks, with the same `nodes`; the others return 0.
    """
    device = runtime.device if dist.get_backend() == "nccl" else torch.device("cpu")
    best, offset = float("inf"), 0.0
    clock = torch.zeros(1, dtype=torch.float64, device=device)
    for rank in sorted({nodes.index(node) for node in nodes} - {0}):
        for _ in range(repeats):
            if runtime.rank == rank:
                sent = time.time()
                dist.send(clock, 0)
                dist.recv(clock, 0)
                theirs, received = float(clock), time.time()
                if received - sent < best:
                    best, offset = received - sent, (sent + received) / 2 - theirs
            elif runtime.is_main:
                dist.recv(clock, rank)
                clock.fill_(time.time())
                dist.send(clock, rank)
    return offset


def matmul_tflops(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """The rate of a bf16 matrix product, TFLOP/s; the median, so that a warm-up does not count."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / sorted(seconds)[repeats // 2] / 1e12
