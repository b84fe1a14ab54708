"""All-to-all of several tensors in one call, with any split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.comm.ledger import Ledger
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
        outgoing: per receiving rank its tensors, all of one dtype and device.
        incoming: per sending rank the shapes of its tensors.
        group: the ranks that take part.
        ledger: counts what goes to other ranks.
        kind: the name under which it counts.

    Returns:
        Per sending rank its tensors, views of one buffer; in a group of one those that were given.

    Collective:
        Every rank of the group; one `all_to_all_single` with uneven splits.
    """
    if group.cp_size == 1:
        return [list(outgoing[0])]
    flat = [t.reshape(-1) for tensors in outgoing for t in tensors]
    send = torch.cat(flat)
    send_sizes = [sum(t.numel() for t in tensors) for tensors in outgoing]
    receive_sizes = [sum(_numel(s) for s in shapes) for shapes in incoming]
    if ledger is not None:
        others = send.numel() - send_sizes[group.cp_rank]
        ledger.add(kind, others * send.element_size())
    # gloo moves host memory only.
    through_host = send.is_cuda and dist.get_backend(group.process_group) == "gloo"
    buffer = send.cpu() if through_host else send
    received = torch.empty(sum(receive_sizes), dtype=send.dtype, device=buffer.device)
    dist.all_to_all_single(received, buffer, receive_sizes, send_sizes, group=group.process_group)
    if through_host:
        received = received.to(send.device)
    lists = []
    offset = 0
    for shapes in incoming:
        tensors = []
        for shape in shapes:
            tensors.append(received[offset : offset + _numel(shape)].view(shape))
            offset += _numel(shape)
        lists.append(tensors)
    return lists


def _numel(shape: Shape) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
