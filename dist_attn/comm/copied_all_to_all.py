"""All-to-all between GPUs of one host by their copy engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup
from dist_attn.peer_memory import ALIGNMENT, Lane


def copied_all_to_all(
    outgoing: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    group: CommGroup,
    message_bytes: int,
    *,
    ledger: Ledger | None = None,
) -> None:
    """Copy to each other rank its tensors, by way of its peer memory, to where it wants them.

    Everything happens on the current stream, and none of it needs a multiprocessor. What a rank has
    for itself is left to the caller.

    Args:
        outgoing: per receiving rank its tensors, contiguous.
        targets: per sending rank where its tensors go, contiguous, of the shapes that it sends.
        group: the ranks, with peer memory.
        message_bytes: the most that one rank sends to another; the same on all ranks.
        ledger: counts what goes to other ranks.

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
        for place, x in zip(_places(lane, number, r, me, outgoing[r]), outgoing[r], strict=True):
            place.copy_(x)
        memory.write(lane.word(r, 1, me), number, stream)
    for r in others:
        memory.wait(lane.word(me, 1, r), number, stream)
        for x, place in zip(targets[r], _places(lane, number, me, r, targets[r]), strict=True):
            x.copy_(place)
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
        assert x.is_contiguous(), "copy engines take contiguous tensors"
        end = offset + x.nbytes
        assert end <= len(slot), "a message is larger than was said"
        places.append(slot[offset:end].view(x.dtype).view(x.shape))
        offset = _aligned(end)
    return places


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
