"""Point-to-point exchange: all that a rank sends and receives in one phase, started together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup


@dataclass
class Exchange:
    """The messages of one phase.

    Add messages, `start`, compute something else, `wait`. Both ends of a message belong to the same
    phase, and two messages between the same two ranks are added in the same order on both; then no
    order of phases can deadlock.

    Collective:
        Only the ranks that send or receive take part.
    """

    group: CommGroup
    ledger: Ledger | None = None
    _ops: list[dist.P2POp] = field(default_factory=list)
    _works: list[dist.Work] = field(default_factory=list)
    _arrivals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def send(self, tensor: Tensor, cp_rank: int, kind: str) -> None:
        """Send a contiguous tensor, which must stay unchanged until `wait`."""
        if tensor.numel() == 0:
            return
        if self.ledger is not None:
            self.ledger.add(kind, tensor.numel() * tensor.element_size())
        staged = tensor.cpu() if self._through_host(tensor) else tensor
        self._add(dist.isend, staged, cp_rank)

    def receive(self, tensor: Tensor, cp_rank: int) -> None:
        """Receive into a contiguous tensor, which is filled after `wait`."""
        if tensor.numel() == 0:
            return
        if self._through_host(tensor):
            staged = torch.empty_like(tensor, device="cpu")
            self._arrivals.append((tensor, staged))
            tensor = staged
        self._add(dist.irecv, tensor, cp_rank)

    def start(self) -> None:
        """Start everything that was added."""
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)

    def wait(self) -> None:
        """Wait until everything that was started has arrived; on a GPU, its stream waits."""
        for work in self._works:
            work.wait()
        for tensor, staged in self._arrivals:
            tensor.copy_(staged)
        self._ops, self._works, self._arrivals = [], [], []

    def _add(self, op: Callable[..., Any], tensor: Tensor, cp_rank: int) -> None:
        assert tensor.is_contiguous(), "messages are contiguous"
        peer = self.group.peer(cp_rank)
        self._ops.append(dist.P2POp(op, tensor, peer, self.group.process_group))

    def _through_host(self, tensor: Tensor) -> bool:
        # gloo crashes on point-to-point messages of CUDA tensors.
        return tensor.is_cuda and dist.get_backend(self.group.process_group) == "gloo"
