"""Point-to-point exchange: all that a rank sends and receives in one phase, started together.

By torch.distributed, or, between GPUs of one host, by copies into each other's memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn.comm.ledger import Ledger, waiting
from dist_attn.groups import CommGroup
from dist_attn.peer_memory import Lane, PeerMemory, aligned

Shape = tuple[int, ...]
#: Kinds of messages: keys and values, their gradients on the way, and those that come home. In one
#: phase a rank receives from one rank at the most of each.
LaneName = Literal["kv", "dkv", "home"]


class Exchange(Protocol):
    """The messages of one phase.

    Add messages, `start`, compute something else, `wait`. Both ends of a message belong to the same
    phase, and two messages between the same two ranks are added in the same order on both; then no
    order of phases can deadlock. Every rank of the group makes an exchange for every phase, with
    messages or without.
    """

    def send(self, tensor: Tensor, cp_rank: int, lane: LaneName, kind: str | None = None) -> None:
        """Send a contiguous tensor, which must stay unchanged until `wait`.

        Args:
            tensor: what is sent.
            cp_rank: who gets it, counted round the end.
            lane: the kind of message.
            kind: the name under which the ledger counts it, by default the lane's.
        """

    def receive(self, shape: Shape, like: Tensor, cp_rank: int, lane: LaneName) -> Tensor:
        """Return where a message will be after `wait`, of the dtype and device of `like`.

        It stays there until the phase after the next one starts.
        """

    def start(self) -> None:
        """Start everything that was added."""

    def wait(self) -> None:
        """Wait until everything has arrived and been sent; on a GPU, its stream waits."""


@dataclass(frozen=True)
class Transport:
    """How a group exchanges in one attention call.

    Attributes:
        group: the ranks.
        ledger: counts what is sent.
        lanes: memory for each kind of message, where GPUs copy to each other.
    """

    group: CommGroup
    ledger: Ledger | None
    lanes: dict[LaneName, Lane]

    def exchange(self) -> Exchange:
        """Make the exchange of the next phase."""
        if self.lanes:
            assert self.group.peers is not None
            return _CopyExchange(self.group, self.group.peers, self.lanes, self.ledger)
        return _MessageExchange(self.group, self.ledger)


def open_transport(
    group: CommGroup, ledger: Ledger | None, lane_bytes: dict[LaneName, int]
) -> Transport:
    """Prepare the phases of one call.

    Args:
        group: the ranks.
        ledger: counts what is sent.
        lane_bytes: the most that a rank receives in one phase, of each kind; the same on all ranks.

    Collective:
        Every rank of the group, where it has peer memory.
    """
    if group.peers is None:
        return Transport(group, ledger, {})
    lanes = {name: group.peers.lane(name, size) for name, size in lane_bytes.items()}
    return Transport(group, ledger, lanes)


@dataclass
class _MessageExchange:
    """By messages of torch.distributed. Only the ranks that send or receive take part."""

    group: CommGroup
    ledger: Ledger | None = None
    _ops: list[dist.P2POp] = field(default_factory=list)
    _works: list[dist.Work] = field(default_factory=list)
    _arrivals: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def send(self, tensor: Tensor, cp_rank: int, lane: LaneName, kind: str | None = None) -> None:
        """See `Exchange`."""
        if tensor.numel() == 0:
            return
        _count(self.ledger, tensor, kind or lane)
        staged = tensor.cpu() if self._through_host(tensor) else tensor
        self._add(dist.isend, staged, cp_rank)

    def receive(self, shape: Shape, like: Tensor, cp_rank: int, lane: LaneName) -> Tensor:
        """See `Exchange`."""
        tensor = like.new_empty(shape)
        if tensor.numel() == 0:
            return tensor
        staged = tensor
        if self._through_host(tensor):
            staged = torch.empty_like(tensor, device="cpu")
            self._arrivals.append((tensor, staged))
        self._add(dist.irecv, staged, cp_rank)
        return tensor

    def start(self) -> None:
        """See `Exchange`."""
        if self._ops:
            self._works = dist.batch_isend_irecv(self._ops)

    def wait(self) -> None:
        """See `Exchange`."""
        if self._works:
            with waiting(self.ledger):
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


class _CopyExchange:
    """By copy engines, into slots of the receivers' memory; see `peer_memory`."""

    def __init__(
        self,
        group: CommGroup,
        memory: PeerMemory,
        lanes: dict[LaneName, Lane],
        ledger: Ledger | None,
    ) -> None:
        self._me, self._size = group.cp_rank, group.cp_size
        self._memory, self._lanes, self._ledger = memory, lanes, ledger
        self._number = memory.next_number()
        self._sends: dict[tuple[LaneName, int], list[Tensor]] = {}
        self._sources: dict[LaneName, int] = {}
        self._filled: Counter[str] = Counter()
        self._sent: torch.cuda.Event | None = None

    def send(self, tensor: Tensor, cp_rank: int, lane: LaneName, kind: str | None = None) -> None:
        """See `Exchange`."""
        if tensor.numel() == 0:
            return
        assert tensor.is_contiguous(), "messages are contiguous"
        _count(self._ledger, tensor, kind or lane)
        self._sends.setdefault((lane, cp_rank % self._size), []).append(tensor)

    def receive(self, shape: Shape, like: Tensor, cp_rank: int, lane: LaneName) -> Tensor:
        """See `Exchange`."""
        if math.prod(shape) == 0:
            return like.new_empty(shape)
        source = cp_rank % self._size
        assert self._sources.setdefault(lane, source) == source, "a lane has one sender at a time"
        slot, first = self._lanes[lane].own_slot(self._number), self._filled[lane]
        end = first + math.prod(shape) * like.element_size()
        assert end <= len(slot), "a message is larger than was said"
        self._filled[lane] = first + aligned(end - first)
        return slot[first:end].view(like.dtype).view(shape)

    def start(self) -> None:
        """See `Exchange`."""
        memory, number = self._memory, self._number
        memory.stream.wait_stream(torch.cuda.current_stream())
        # What was in the slots two phases ago has been used.
        for name, source in self._sources.items():
            memory.write(self._lanes[name].word(source, 0, self._me), number, memory.stream)
        for (name, to), tensors in self._sends.items():
            lane = self._lanes[name]
            memory.wait(lane.word(self._me, 0, to), number, memory.stream)
            first, offset = lane.slot_address(to, number), 0
            for x in tensors:
                assert offset + x.nbytes <= lane.slot_bytes, "a message is larger than was said"
                memory.copy(first + offset, x.data_ptr(), x.nbytes, memory.stream)
                offset += aligned(x.nbytes)
            memory.write(lane.word(to, 1, self._me), number, memory.stream)
        self._sent = memory.stream.record_event()

    def wait(self) -> None:
        """See `Exchange`."""
        stream = torch.cuda.current_stream()
        with waiting(self._ledger):
            for name, source in self._sources.items():
                self._memory.wait(self._lanes[name].word(self._me, 1, source), self._number, stream)
            if self._sent is not None:
                stream.wait_event(self._sent)
        self._sends = {}


def _count(ledger: Ledger | None, tensor: Tensor, kind: str) -> None:
    if ledger is not None:
        ledger.add(kind, tensor.nbytes)
