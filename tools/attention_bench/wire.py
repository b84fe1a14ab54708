"""What a rank sends, counted where torch.distributed is called, whoever calls it.

gloo moves host memory only: tensors of a GPU are staged through the host here, so that peers that
know nothing of it can run with several ranks on one GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Wire:
    """Bytes that this rank has sent to others, and calls."""

    sent_bytes: int = 0
    calls: int = 0

    def add(self, num_bytes: float) -> None:
        """Count one call."""
        self.sent_bytes += round(num_bytes)
        self.calls += 1

    def clear(self) -> None:
        """Start anew."""
        self.sent_bytes = self.calls = 0


class _Later:
    """Several pending calls as one, with what is to be done when they are through."""

    def __init__(self, works: list[Any], then: list[Callable[[], Any]]) -> None:
        self._works, self._then = works, then

    def wait(self) -> None:
        """Wait for all."""
        for work in self._works:
            work.wait()
        for action in self._then:
            action()


@contextlib.contextmanager
def counted(wire: Wire) -> Iterator[None]:
    """Count every exchange of this process."""
    patches = {
        "batch_isend_irecv": _point_to_point(wire),
        "all_to_all_single": _all_to_all(wire),
        "all_gather_into_tensor": _gather_like(wire, "all_gather_into_tensor"),
        "reduce_scatter_tensor": _gather_like(wire, "reduce_scatter_tensor"),
    }
    before = {name: getattr(dist, name) for name in patches}
    for name, function in patches.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _staged(tensor: Tensor, group: Any) -> bool:
    return tensor.is_cuda and dist.get_backend(group) == "gloo"


def _point_to_point(wire: Wire) -> Callable[..., Any]:
    original = dist.batch_isend_irecv

    def call(ops: list[dist.P2POp]) -> list[Any]:
        then: list[Callable[[], Any]] = []
        staged = []
        for op in ops:
            if op.op is dist.isend:
                wire.add(_bytes(op.tensor))
            tensor = op.tensor
            if _staged(tensor, op.group):
                host = (
                    tensor.cpu()
                    if op.op is dist.isend
                    else torch.empty_like(op.tensor, device="cpu")
                )
                if op.op is dist.irecv:
                    then.append(lambda to=tensor, host=host: to.copy_(host))
                tensor = host
            staged.append(dist.P2POp(op.op, tensor, op.peer, op.group))
        return [_Later(original(staged), then)]

    return call


def _all_to_all(wire: Wire) -> Callable[..., Any]:
    original = dist.all_to_all_single

    def call(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group", args[2] if len(args) > 2 else None)
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        splits = kwargs.get("input_split_sizes", args[1] if len(args) > 1 else None)
        row = _bytes(input) / max(len(input), 1)
        kept = row * splits[rank] if splits else _bytes(input) / size
        wire.add(_bytes(input) - kept)
        if not _staged(input, group):
            return original(output, input, *args, **kwargs)
        host = torch.empty_like(output, device="cpu")
        work = original(host, input.cpu(), *args, **kwargs)
        if work is None:
            output.copy_(host)
            return None
        return _Later([work], [lambda: output.copy_(host)])

    return call


def _gather_like(wire: Wire, name: str) -> Callable[..., Any]:
    """Count what a ring would send: all but one of the parts, once."""
    original = getattr(dist, name)

    def call(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        size = dist.get_world_size(group)
        wire.add(max(_bytes(output), _bytes(input)) * (size - 1) / size)
        if not _staged(input, group):
            return original(output, input, *args, **kwargs)
        host = torch.empty_like(output, device="cpu")
        work = original(host, input.cpu(), *args, **kwargs)
        if work is None:
            output.copy_(host)
            return None
        return _Later([work], [lambda: output.copy_(host)])

    return call
