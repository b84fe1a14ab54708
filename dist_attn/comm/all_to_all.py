"""All-to-all of several tensors in one call, with any split."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.comm.ledger import Ledger, waiting
from dist_attn.groups import CommGroup

Shape = tuple[int, ...]


def all_to_all(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Shape]],
    group: CommGroup,
    *,
    ledger: Ledger | None = None,
    kind: str = "all_to_all",
) -> list[list[Tensor]]:
    """Send each rank of the group a list of tensors and return the lists that they sent.

    Args:
        outgoing: per receiving rank its tensors, all of one dtype and device. They are packed into
            one buffer, unless they lie one after another already.
        incoming: per sending rank the shapes of its tensors.
        group: the ranks that take part.
        ledger: counts what goes to other ranks.
        kind: the name under which it counts.

    Returns:
        Per sending rank its tensors, views of one buffer, one after another; in a group of one
        those that were given.

    Collective:
        Every rank of the group; one `all_to_all_single` with uneven splits.
    """
    if group.cp_size == 1:
        return [list(outgoing[0])]
    send = _packed([t for tensors in outgoing for t in tensors])
    send_sizes = [sum(t.numel() for t in tensors) for tensors in outgoing]
    receive_sizes = [sum(math.prod(s) for s in shapes) for shapes in incoming]
    if ledger is not None:
        others = send.numel() - send_sizes[group.cp_rank]
        ledger.add(kind, others * send.element_size())
    # gloo moves host memory only.
    through_host = send.is_cuda and dist.get_backend(group.process_group) == "gloo"
    buffer = send.cpu() if through_host else send
    received = torch.empty(sum(receive_sizes), dtype=send.dtype, device=buffer.device)
    with waiting(ledger):
        dist.all_to_all_single(
            received, buffer, receive_sizes, send_sizes, group=group.process_group
        )
    if through_host:
        received = received.to(send.device)
    lists = []
    offset = 0
    for shapes in incoming:
        tensors = []
        for shape in shapes:
            numel = math.prod(shape)
            tensors.append(received[offset : offset + numel].view(shape))
            offset += numel
        lists.append(tensors)
    return lists


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along dim 0, without a copy if they lie one after another."""
    if len(parts) == 1:
        return parts[0]
    flat = _in_sequence(parts)
    if flat is None:
        return torch.cat(list(parts))
    return flat.view(sum(len(p) for p in parts), *parts[0].shape[1:])


def _packed(tensors: list[Tensor]) -> Tensor:
    """Return all elements in one flat tensor."""
    flat = _in_sequence(tensors)
    if flat is not None:
        return flat
    buffer = tensors[0].new_empty(sum(t.numel() for t in tensors))
    offset = 0
    for t in tensors:
        buffer[offset : offset + t.numel()].view(t.shape).copy_(t)
        offset += t.numel()
    return buffer


def _in_sequence(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a flat view of tensors that lie one after another in one storage, else None."""
    held = [t for t in tensors if t.numel()]
    if not held:
        return tensors[0].reshape(-1)
    end = held[0].data_ptr()
    storage = held[0].untyped_storage().data_ptr()
    for t in held:
        mine = t.untyped_storage().data_ptr() == storage
        if not (mine and t.is_contiguous() and t.data_ptr() == end):
            return None
        end += t.numel() * t.element_size()
    return held[0].as_strided((sum(t.numel() for t in held),), (1,))
