"""Memory of this GPU into which the other GPUs of its host copy, without a kernel on either side.

NCCL's kernels take multiprocessors from the attention that should hide them, and attention kernels
that keep one program on each multiprocessor from start to end may then wait for the last one. Copy
engines take none. Each rank has, for every lane of messages, two slots that the others write into
in turn, and words by which they tell each other that a slot is free and that a message is there;
streams wait on these words in the GPU's front end, the host does not wait at all.

Source: the scheme of NCCL's own copy-engine collectives (2.28); memory is shared by torch's
symmetric memory.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Bytes at the end of a lane, for the words: one per rank for free slots, one for messages.
_WORDS_BYTES = 4096
#: Slots begin and messages are placed at multiples of this.
ALIGNMENT = 256
_GREATER_OR_EQUAL = 0
_DEFAULT_WRITE = 0


@dataclass(frozen=True)
class Lane:
    """Memory for one kind of message, as one rank sees it; `peers` is by place in the group."""

    own: Tensor
    peers: tuple[Tensor, ...]
    slot_bytes: int

    @functools.cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each rank's memory begins, as this GPU sees it."""
        return tuple(int(x.data_ptr()) for x in self.peers)

    def own_slot(self, number: int) -> Tensor:
        """This rank's slot of the exchange `number`, uint8."""
        first = number % 2 * self.slot_bytes
        return self.own[first : first + self.slot_bytes]

    def slot_address(self, cp_rank: int, number: int) -> int:
        """Where a rank's slot of the exchange `number` begins."""
        return self.addresses[cp_rank] + number % 2 * self.slot_bytes

    def word(self, holder: int, kind: int, writer: int) -> int:
        """Address of the word of `holder` that `writer` writes; kind 0: free, 1: message there."""
        at = 2 * self.slot_bytes + 4 * (kind * len(self.peers) + writer)
        return self.addresses[holder] + at


class PeerMemory:
    """The lanes of one group. All its ranks use it in step.

    Args:
        process_group: a group whose ranks have one GPU each, on one host.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group
        self._lanes: dict[str, Lane] = {}
        self._number = 0
        self.stream = torch.cuda.Stream(priority=-1)

    @property
    def num_bytes(self) -> int:
        """This rank's memory of all lanes; torch's allocator does not count it."""
        return sum(lane.own.nbytes for lane in self._lanes.values())

    def next_number(self) -> int:
        """Number of the next exchange, the same on all ranks."""
        self._number += 1
        return self._number

    def lane(self, name: str, slot_bytes: int) -> Lane:
        """Return a lane whose slots hold so many bytes, made larger if need be.

        Collective: by all ranks of the group, with the same arguments.
        """
        lane = self._lanes.get(name)
        if lane is None or lane.slot_bytes < slot_bytes:
            self._lanes[name] = lane = self._make(slot_bytes)
        return lane

    def wait(self, address: int, number: int, stream: torch.cuda.Stream) -> None:
        """Let a stream wait until the word at an address is at least `number`."""
        _check(
            _driver().cuStreamWaitValue32(stream.cuda_stream, address, number, _GREATER_OR_EQUAL)
        )

    def write(self, address: int, number: int, stream: torch.cuda.Stream) -> None:
        """Let a stream write a word, after all that it has copied."""
        _check(_driver().cuStreamWriteValue32(stream.cuda_stream, address, number, _DEFAULT_WRITE))

    def copy(self, target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Let a stream copy between addresses of any GPUs of the group.

        Torch's own copy would take ten times as long to start, with a change of stream.
        """
        if num_bytes:
            _check(_driver().cuMemcpyAsync(target, source, num_bytes, stream.cuda_stream))

    def _make(self, slot_bytes: int) -> Lane:
        from torch.distributed import _symmetric_memory as symmetric  # noqa: PLC0415 - CUDA only

        # What still copies into the lane that this one replaces must be done.
        torch.cuda.synchronize()
        slot_bytes = aligned(slot_bytes)
        total = 2 * slot_bytes + _WORDS_BYTES
        own = symmetric.empty(total, dtype=torch.uint8, device=torch.device("cuda"))
        own[2 * slot_bytes :].zero_()
        handle = symmetric.rendezvous(own, self._process_group)
        size = dist.get_world_size(self._process_group)
        peers = tuple(handle.get_buffer(r, (total,), torch.uint8) for r in range(size))
        torch.cuda.synchronize()
        dist.barrier(self._process_group, device_ids=[torch.cuda.current_device()])
        return Lane(own, peers, slot_bytes)


def aligned(num_bytes: int) -> int:
    """Return what a message of so many bytes takes of a slot."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def why_no_peer_memory(ranks: tuple[int, ...], process_group: dist.ProcessGroup) -> str | None:
    """Say why a group's messages cannot be copied from GPU to GPU, or None.

    Collective: by all ranks of the group, when it is made.
    """
    if dist.get_backend(process_group) != "nccl":
        return "the group does not work by NCCL"
    mine = (platform.node(), _refusal(ranks))
    answers: list[tuple[str, str | None]] = [mine] * len(ranks)
    dist.all_gather_object(answers, mine, group=process_group)
    if len({host for host, _ in answers}) > 1:
        return "its ranks are not all on one host"
    return next((reason for _, reason in answers if reason is not None), None)


def _refusal(ranks: tuple[int, ...]) -> str | None:
    if len(ranks) * 8 > _WORDS_BYTES:
        return "it has too many ranks"
    if torch.cuda.device_count() < len(ranks):
        return "its ranks do not see each other's GPUs"
    try:
        _driver()
    except (ImportError, OSError) as error:
        return f"the driver's bindings do not load: {error}"
    here = torch.cuda.current_device()
    for device in range(torch.cuda.device_count()):
        if device != here and not torch.cuda.can_device_access_peer(here, device):
            return f"GPU {here} cannot write to GPU {device}"
    return None


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver  # noqa: PLC0415 - comes with torch's CUDA builds

    return driver


def _check(result: tuple[Any, ...]) -> None:
    status = result[0]
    if int(status) != 0:
        raise RuntimeError(f"the CUDA driver refused a stream's memory operation: {status.name}")
