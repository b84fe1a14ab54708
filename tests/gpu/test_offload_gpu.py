"""Saved tensors on the host: the device's memory is free of them, and numbers stay."""

from __future__ import annotations

import pytest
import torch

from dist_attn.integrations.offload import HostOffload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_on_a_gpu_the_device_is_free_of_what_was_moved() -> None:
    x = torch.randn(1 << 24, device="cuda", requires_grad=True)
    used, gradients = [], []
    offload = HostOffload()
    for moves in (True, False):
        before = torch.cuda.memory_allocated()
        with offload.keeping() if moves else torch.enable_grad():
            y = x * 1
            for _ in range(4):
                y = y.sin()  # saves its input
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated() - before)
        y.sum().backward()
        gradients.append(x.grad)
        x.grad = None
        del y
    assert used[1] - used[0] >= 3 * x.numel() * 4
    assert torch.equal(*gradients)
    assert offload.num_prefetched == 3
