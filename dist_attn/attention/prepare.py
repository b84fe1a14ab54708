"""What attention works out of a mask, ahead of the call that needs it and beside the device's work.

The lists that block-sparse kernels walk are made on the host, from the mask and the tokens of two
ranks. That takes a good part of a second for a long stream, in which the device would have nothing
to do; so a thread makes those of the next micro-batch while the device is busy with this one.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_attn.attention.dispatch import choose_strategy
from dist_attn.attention.gather import Gather
from dist_attn.attention.ring import Ring
from dist_attn.attention.step import Kernel, Step
from dist_attn.attention.strategy import Call, Local, Strategy
from dist_attn.attention.tile_step import TileStep, why_not_block_sparse
from dist_attn.attention.two_level import Inner, TwoLevel
from dist_attn.attention.ulysses import Ulysses
from dist_attn.attention.workload import workload
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask
from dist_attn_kernels.dense import choose_backend


@dataclass(frozen=True)
class Heads:
    """What a rank's queries, keys and values will be like in every layer."""

    q: int
    kv: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """A rank's place in a group that will compute, without the group itself.

    Attributes:
        masks: of the layers, each once.
        layout: of the group's stream.
        cp_rank: the place in the group.
        strategy: by name, as planned; a group of one is always local.
        inner_size: ranks of a node, for strategies in two levels.
    """

    masks: tuple[Mask, ...]
    layout: Layout
    cp_rank: int
    strategy: str
    inner_size: int | None = None


class Preparer:
    """Makes lists ahead, one micro-batch at a time; does nothing where no kernel needs lists.

    Args:
        device: where they go.
        heads: of every layer.
    """

    def __init__(self, device: torch.device, heads: Heads) -> None:
        self._device = device
        self._heads = heads
        self._stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        if why_not_block_sparse(device, heads.dtype, heads.head_dim) is None:
            index = torch.cuda.current_device() if device.index is None else device.index
            self._device = torch.device(device.type, index)
            self._stream = torch.cuda.Stream(self._device)

    def begin(self, parts: list[Part]) -> None:
        """Begin with what a coming micro-batch needs."""
        if self._stream is None:
            return
        assert self._thread is None, "take what was begun before"
        user = torch.cuda.current_stream(self._device)
        self._thread = threading.Thread(target=self._run, args=(parts, user), daemon=True)
        self._thread.start()

    def take(self) -> None:
        """Wait until what was begun is there; the current stream waits for the device's part."""
        if self._thread is None or self._stream is None:
            return
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _run(self, parts: list[Part], user: torch.cuda.Stream) -> None:
        assert self._stream is not None
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                for step, num_kv_heads in steps_of(parts, self._heads, self._device):
                    if not isinstance(step, TileStep):
                        continue
                    for tensor in _tensors(step.prepare(self._device, num_kv_heads)):
                        # Not given to others before the stream that reads it has done so.
                        tensor.record_stream(user)
        except BaseException as error:  # raised where it is waited for
            self._failure = error


def steps_of(parts: list[Part], heads: Heads, device: torch.device) -> Iterator[tuple[Step, int]]:
    """Every step that forward and backward of these parts will ask for, with its key/value heads.

    The objects are those that the calls will find.
    """
    every = tuple(range(heads.q))
    kernel = Kernel(choose_backend(device, heads.dtype, heads.head_dim).backend, 1.0)
    for part in parts:
        group = _structure(part.layout.cp_size, part.cp_rank, part.inner_size)
        strategy = choose_strategy(part.strategy, group)
        for mask in part.masks:
            work = workload(mask, part.layout, part.cp_rank, every, heads.kv)
            yield from _steps(strategy, Call(work, group, kernel, None), device)


def _structure(cp_size: int, cp_rank: int, inner_size: int | None) -> CommGroup:
    """A group of such a size that nobody can send in."""
    ranks = tuple(range(cp_size))
    group = CommGroup(ranks, cp_rank, None)
    if inner_size is None:
        return group
    node, place = divmod(cp_rank, inner_size)
    inner = CommGroup(ranks[node * inner_size : (node + 1) * inner_size], place, None)
    return dataclasses.replace(
        group, inner=inner, outer=CommGroup(ranks[place::inner_size], node, None)
    )


def _steps(
    strategy: Strategy | Inner, call: Call, device: torch.device
) -> Iterator[tuple[Step, int]]:
    """Steps of a strategy, of several levels or of one."""
    if isinstance(strategy, Ulysses):
        for across, share in strategy.shares(call, device):
            yield from _steps(across, share, device)
    elif isinstance(strategy, TwoLevel):
        for inner, share in strategy.shares(call):
            yield from _steps(inner, share, device)
    else:
        yield from _steps_of_one_level(strategy, call)


def _steps_of_one_level(strategy: Strategy | Inner, call: Call) -> Iterator[tuple[Step, int]]:
    """Of one that is not known here none, its calls then make their own."""
    if not isinstance(strategy, (Local, Ring, Gather)):
        return
    work = call.work
    me, size = work.cp_rank, work.layout.cp_size
    yield work.step(me), work.num_kv_heads
    if size == 1:
        return
    if work.num_kv_heads > 1:
        for half in range(2):
            kv_heads = work.half_heads(half)[1]
            yield work.half_step(half), kv_heads.stop - kv_heads.start
    for source in (r for r in range(size) if r != me):
        if isinstance(strategy, Ring) and work.needs[me, source]:
            yield work.step(source), work.num_kv_heads
        if isinstance(strategy, Gather):
            for c, head_class in enumerate(work.head_classes):
                yield work.fetched_step(source, c), len(head_class.kv_heads)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
