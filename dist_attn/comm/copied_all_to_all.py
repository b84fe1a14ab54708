"""All-to-all between GPUs of one host by their copy engines, without packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup
from dist_attn.peer_memory import ALIGNMENT, Lane, runtime_api


def copied_all_to_all(
    outgoing: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    group: CommGroup,
    message_bytes: int,
    *,
    ledger: Ledger | None = None,
    pack: bool = False,
) -> None:
    """Copy each rank's tensors, by way of its peer memory, to where it wants them.

    Everything happens on the current stream, and none of it needs a multiprocessor, if all tensors
    are contiguous inside a row.

    Args:
        outgoing: per receiving rank its tensors, [rows, n, D], rows at any stride.
        targets: per sending rank where its tensors go, of the shapes that it sends.
        group: the ranks, with peer memory.
        message_bytes: the most that one rank sends to another; the same on all ranks.
        ledger: counts what goes to other ranks.
        pack: gather rows by a kernel before they are sent, which is quicker where nothing computes.

    Collective:
        Every rank of the group.
    """
    memory, me, size = group.peers, group.cp_rank, group.cp_size
    assert memory is not None
    stream = torch.cuda.current_stream()
    lane = memory.lane("trade", size * _aligned(message_bytes))
    number = memory.next_number()
    others = [(me + shift) % size for shift in range(1, size)]
    for r in others:
        memory.write(lane.word(r, 0, me), number, stream)
    for r in others:
        memory.wait(lane.word(me, 0, r), number, stream)
        places = _places(lane, number, r, me, outgoing[r])
        for place, x in zip(places, outgoing[r], strict=True):
            _copy(place, x.contiguous() if pack else x, stream)
        memory.write(lane.word(r, 1, me), number, stream)
    for target, x in zip(targets[me], outgoing[me], strict=True):
        _copy(target, x, stream)
    for r in others:
        memory.wait(lane.word(me, 1, r), number, stream)
        places = _places(lane, number, me, r, targets[r])
        for target, place in zip(targets[r], places, strict=True):
            _copy(target, place, stream)
    if ledger is not None:
        ledger.add("all_to_all", sum(x.nbytes for r in others for x in outgoing[r]))


def _places(
    lane: Lane, number: int, holder: int, writer: int, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Where in the memory of `holder` the tensors of `writer` lie, like these in shape and type."""
    slot = lane.slot(holder, number)
    offset = len(slot) // len(lane.peers) // ALIGNMENT * ALIGNMENT * writer
    places = []
    for x in tensors:
        end = offset + x.numel() * x.element_size()
        assert end <= len(slot), "a message is larger than was said"
        places.append(slot[offset:end].view(x.dtype).view(x.shape))
        offset = _aligned(end)
    return places


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _copy(target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
    if not target.numel():
        return
    plain = target.is_contiguous() and source.is_contiguous()
    if plain or not (_in_rows(target) and _in_rows(source)):
        target.copy_(source)
        return
    size = target.element_size()
    api: Any = runtime_api()
    status, *_ = api.cudaMemcpy2DAsync(
        target.data_ptr(), target.stride(0) * size, source.data_ptr(), source.stride(0) * size,
        target[0].numel() * size, len(target), api.cudaMemcpyKind.cudaMemcpyDefault,
        stream.cuda_stream,
    )  # fmt: skip
    if int(status) != 0:
        raise RuntimeError(f"CUDA refused a copy between GPUs: {status.name}")


def _in_rows(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]
