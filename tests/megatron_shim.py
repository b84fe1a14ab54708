"""Let Megatron's gradient buffers and distributed optimizer run in CPU ranks, for tests only.

They name the device "cuda" in a dozen places, and ask parameters whether they are CUDA tensors.
Inside `cuda_is_cpu` these calls mean the CPU; nothing else about them changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _Device(TorchFunctionMode):
    """Factories that ask for a CUDA device make CPU tensors, which say they are CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


@contextlib.contextmanager
def cuda_is_cpu() -> Iterator[None]:
    """Run Megatron's optimizer code on the CPU."""
    with mock.patch("torch.cuda.current_device", return_value="cuda:0"), _Device():
        yield
