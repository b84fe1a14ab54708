"""Exchange rates: ours against NCCL's own for the same bytes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from multi_gpu.attention import group_of_all
from multi_gpu.timing import Clock, Report, seconds_of
from torch import Tensor

from dist_attn.comm.all_to_all import all_to_all
from dist_attn.comm.exchange import open_transport
from dist_attn.groups import CommGroup

HEADS, DIM = 32, 128


def run(report: Report, clock: Clock) -> None:
    """Time each exchange for a few sizes; GB/s are what a rank sends, and receives as well."""
    size = dist.get_world_size()
    group = group_of_all(copies=True)
    for tokens in (1024, 8192, 32768):
        if not clock.allows(20):
            report.note(f"exchange rates from {tokens} tokens were left out: time was up")
            return
        kv = [_random(tokens) for _ in range(2)]
        num_bytes = 2 * kv[0].nbytes
        for name, ours, theirs in (
            ("ring step", lambda k=kv: _ring(group, k), lambda k=kv: _plain(group, k)),
            (
                "block gather",
                lambda k=kv: _gather(group, k),
                lambda k=kv: _plain(group, k, half=True),
            ),
            ("all-to-all", lambda k=kv: _heads(group, k), lambda k=kv: _plain_all_to_all(k)),
        ):
            sent = {"ring step": 1.0, "block gather": 0.5, "all-to-all": (size - 1) / size}[name]
            gb = num_bytes * sent / 1e9
            report.add(
                "Exchange",
                what=name,
                tokens=tokens,
                MiB=num_bytes * sent / 2**20,
                ours_gb_per_s=gb / seconds_of(ours, least_s=0.1),
                nccl_gb_per_s=gb / seconds_of(theirs, least_s=0.1),
            )


def _random(tokens: int) -> Tensor:
    return torch.randn(tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)


def _ring(group: CommGroup, kv: list[Tensor]) -> None:
    _exchange(group, kv)


def _gather(group: CommGroup, kv: list[Tensor]) -> None:
    """Every other block of 64 tokens: what a sparse mask may ask for."""
    _exchange(group, [x.view(-1, 2, 64, HEADS, DIM)[:, 0].contiguous() for x in kv])


def _exchange(group: CommGroup, kv: list[Tensor]) -> None:
    most = sum(x.nbytes for x in kv)
    exchange = open_transport(group, None, {"kv": most}).exchange()
    for x in kv:
        exchange.send(x, group.cp_rank + 1, "kv")
    for x in kv:
        exchange.receive(tuple(x.shape), x, group.cp_rank - 1, "kv")
    exchange.start()
    exchange.wait()


def _heads(group: CommGroup, kv: list[Tensor]) -> None:
    """Tokens with all heads into heads with all tokens, packing and unpacking included."""
    size = group.cp_size
    outgoing = [[x.chunk(size, 1)[r] for x in kv] for r in range(size)]
    shape = tuple(outgoing[0][0].shape)
    received = all_to_all(outgoing, [[shape] * 2 for _ in range(size)], group)
    for i in range(2):
        torch.cat([parts[i] for parts in received])


def _plain(group: CommGroup, kv: list[Tensor], half: bool = False) -> None:
    sizes = [x.numel() // 2 if half else x.numel() for x in kv]
    ops = []
    for x, n in zip(kv, sizes, strict=True):
        there, back = group.peer(group.cp_rank + 1), group.peer(group.cp_rank - 1)
        ops.append(dist.P2POp(dist.isend, x.view(-1)[:n], there))
        ops.append(dist.P2POp(dist.irecv, x.new_empty(n), back))
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def _plain_all_to_all(kv: list[Tensor]) -> None:
    for x in kv:
        dist.all_to_all_single(torch.empty_like(x), x)
