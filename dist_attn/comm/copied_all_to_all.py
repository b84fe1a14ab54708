"""All-to-all between GPUs of one host by their copy engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup
from dist_attn.peer_memory import aligned


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
    room = aligned(message_bytes)
    lane = memory.lane("trade", size * room)
    number = memory.next_number()
    others = [(me + shift) % size for shift in range(1, size)]
    for r in others:
        memory.write(lane.word(r, 0, me), number, stream)
    for r in others:
        memory.wait(lane.word(me, 0, r), number, stream)
        first = lane.slot_address(r, number) + room * me
        for x, offset in zip(outgoing[r], _offsets(outgoing[r], room), strict=True):
            memory.copy(first + offset, x.data_ptr(), x.nbytes, stream)
        memory.write(lane.word(r, 1, me), number, stream)
    for r in others:
        memory.wait(lane.word(me, 1, r), number, stream)
        first = lane.slot_address(me, number) + room * r
        for x, offset in zip(targets[r], _offsets(targets[r], room), strict=True):
            memory.copy(x.data_ptr(), first + offset, x.nbytes, stream)
    if ledger is not None:
        ledger.add("all_to_all", sum(x.nbytes for r in others for x in outgoing[r]))


def _offsets(tensors: Sequence[Tensor], room: int) -> list[int]:
    """Where each tensor of a message begins in it."""
    offsets, end = [], 0
    for x in tensors:
        assert x.is_contiguous(), "copy engines take contiguous tensors"
        offsets.append(aligned(end))
        end = offsets[-1] + x.nbytes
    assert end <= room, "a message is larger than was said"
    return offsets
