"""Local attention over packed segments by the kernels that come with torch; which one is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_attn_kernels import reference
from dist_attn_kernels.dense_cuda import CudaBackend, CudnnBackend, FlashBackend
from dist_attn_kernels.segments import Backend, PerSegment, Saved, Segments, bhld

__all__ = [
    "Backend",
    "Choice",
    "CpuFlashBackend",
    "CudaBackend",
    "CudnnBackend",
    "FlashBackend",
    "ReferenceBackend",
    "Saved",
    "Segments",
    "choose_backend",
]

aten = torch.ops.aten


class ReferenceBackend(PerSegment):
    """Plain torch operations: any device and dtype, memory for every score of a segment."""

    name = "reference"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        allowed = _causal(q_LHD) if causal else None
        return reference.attention_forward(q_LHD, k_LKD, v_LKD, allowed, softmax_scale)

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        allowed = _causal(s.q) if causal else None
        return reference.attention_backward(
            s.dout, s.q, s.k, s.v, s.out, s.lse, allowed, softmax_scale
        )


class CpuFlashBackend(PerSegment):
    """`aten._scaled_dot_product_flash_attention_for_cpu`: float32, float64, bfloat16, float16."""

    name = "cpu_flash"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            bhld(q_LHD), bhld(k_LKD), bhld(v_LKD), 0.0, causal, scale=softmax_scale
        )
        return out[0].transpose(0, 1), lse[0]

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            bhld(s.dout), bhld(s.q), bhld(s.k), bhld(s.v), bhld(s.out),
            s.lse[None], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip
        return tuple(g[0].transpose(0, 1) for g in grads)


@dataclass(frozen=True)
class Choice:
    """The backend for a kind of tensors, and why each other one was refused."""

    backend: Backend
    refused: dict[str, str]


@functools.cache
def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """Choose the dense backend of a device and dtype; the answer is kept.

    Raises:
        ValueError: the dtype is no floating type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"attention takes floating-point tensors, got {dtype}")
    refused: dict[str, str] = {}
    table: list[tuple[str, Callable[[], str | None], Callable[[], Backend]]] = [
        ("cuda", lambda: _refuse_flash(device, dtype, head_dim),
         lambda: CudaBackend(_refuse_cudnn(device, head_dim))),
        ("cpu_flash", lambda: _refuse_cpu_flash(device, dtype), CpuFlashBackend),
    ]  # fmt: skip
    for name, refuse, make in table:
        reason = refuse()
        if reason is None:
            return Choice(make(), refused)
        refused[name] = reason
    return Choice(ReferenceBackend(), refused)


def _refuse_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype}"
    if head_dim > 256:
        return f"takes head dimensions up to 256, not {head_dim}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def _refuse_cudnn(device: torch.device, head_dim: int) -> str | None:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "pays from compute capability 9.0"
    if head_dim > 128 or head_dim % 8:
        return f"takes head dimensions up to 128 in eights, not {head_dim}"
    if not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    return None


def _refuse_cpu_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"does not take {dtype}"
    return None


def _causal(q_LHD: Tensor) -> Tensor:
    return torch.ones(len(q_LHD), len(q_LHD), dtype=torch.bool, device=q_LHD.device).tril()
