"""Tensors that autograd keeps, in the host's memory until the backward wants them.

On a GPU copies run on a stream of their own, to and from pinned memory: the forward goes on while
a layer's input is on its way out, and while a layer is in its backward the input of the one before
it is on its way in. On a CPU they are plain copies.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor


class HostOffload:
    """Keeps what is saved for the backward on the host; see the module."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[_Kept] | None = None
        #: Tensors that were moved out, and those that came back before they were wanted.
        self.num_moved = 0
        self.num_prefetched = 0

    def keeping(self) -> AbstractContextManager[None]:
        """Where tensors are saved under this, they are moved."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Kept | Tensor:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return tensor
        kept = _Kept(tensor, self._stream_of(tensor), self._last)
        self._last = weakref.ref(kept)
        self.num_moved += 1
        return kept

    def _unpack(self, kept: _Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.num_prefetched += int(kept.is_coming)
        before = kept.before() if kept.before is not None else None
        tensor = kept.take()
        if before is not None:
            before.bring()
        return tensor

    def _stream_of(self, tensor: Tensor) -> torch.cuda.Stream | None:
        if tensor.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        return self._stream


class _Kept:
    """One tensor on the host."""

    def __init__(
        self, tensor: Tensor, stream: torch.cuda.Stream | None, before: weakref.ref[_Kept] | None
    ) -> None:
        self.before = before
        self._stream = stream
        self._device = tensor.device
        self._back: Tensor | None = None
        source = tensor.detach()
        if stream is None:
            self._host = source.clone()
            return
        self._host = torch.empty_like(source, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._host.copy_(source, non_blocking=True)
        # Its memory is not given to others before the copy is done.
        source.record_stream(stream)

    @property
    def is_coming(self) -> bool:
        """Whether the way back has begun."""
        return self._back is not None

    def bring(self) -> None:
        """Begin the way back."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host
            return
        with torch.cuda.stream(self._stream):
            self._back = torch.empty_like(self._host, device=self._device)
            self._back.copy_(self._host, non_blocking=True)

    def take(self) -> Tensor:
        """The tensor, on its device."""
        self.bring()
        back, self._back = self._back, None
        assert back is not None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            back.record_stream(current)
        return back
