"""Local attention over packed segments: the dense backends, and which one is used."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_attn_kernels import dense_flash4, reference
from dist_attn_kernels.dense_cuda import CudaBackend, CudnnBackend, FlashBackend
from dist_attn_kernels.dense_flash4 import Flash4Backend
from dist_attn_kernels.segments import Backend, PerSegment, Saved, Segments, bhld

__all__ = [
    "Backend",
    "Choice",
    "CpuFlashBackend",
    "CudaBackend",
    "CudnnBackend",
    "Flash4Backend",
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
    """`aten._scaled_dot_product_flash_attention_for_cpu`: float32, float64, bfloat16, float16.

    Args:
        groups_heads: whether the kernel takes fewer key/value heads than query heads; otherwise
            they are repeated here. See `cpu_kernel_groups_heads`.
    """

    name = "cpu_flash"

    def __init__(self, groups_heads: bool) -> None:
        self.groups_heads = groups_heads

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        repeats = self._repeats(q_LHD, k_LKD)
        k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k_LKD, v_LKD))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            bhld(q_LHD), bhld(k), bhld(v), 0.0, causal, scale=softmax_scale
        )
        return out[0].transpose(0, 1), lse[0]

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        repeats = self._repeats(s.q, s.k)
        k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (s.k, s.v))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            bhld(s.dout), bhld(s.q), bhld(k), bhld(v), bhld(s.out),
            s.lse[None], 0.0, causal, scale=softmax_scale,
        )  # fmt: skip
        dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
        if repeats > 1:
            dk, dv = (g.unflatten(1, (-1, repeats)).sum(2) for g in (dk, dv))
        return dq, dk, dv

    def _repeats(self, q_LHD: Tensor, k_LKD: Tensor) -> int:
        return 1 if self.groups_heads else q_LHD.shape[1] // k_LKD.shape[1]


@functools.cache
def cpu_kernel_groups_heads() -> bool:
    """Whether torch's CPU kernel gives grouped query heads the right keys, found by trying.

    It does from some release on; its signature does not tell.
    """
    q_LHD, k_LKD = torch.eye(4, 2)[:, :, None].expand(4, 2, 4), torch.eye(4)[:, None]
    results: list[tuple[Tensor, ...]] = []
    for groups_heads in (True, False):
        backend = CpuFlashBackend(groups_heads)
        try:
            out, lse = backend.forward_one(q_LHD, k_LKD, k_LKD, True, 1.0)
            saved = Saved(q_LHD, q_LHD, k_LKD, k_LKD, out, lse)
            results.append((out, lse, *backend.backward_one(saved, True, 1.0)))
        except RuntimeError:
            return False
    pairs = zip(*results, strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)


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
         lambda: _cuda_backend(device, dtype, head_dim)),
        ("cpu_flash", lambda: _refuse_cpu_flash(device, dtype),
         lambda: CpuFlashBackend(cpu_kernel_groups_heads())),
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


def _cuda_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> CudaBackend:
    refused = _refuse_on_cuda(device, dtype, head_dim)
    found = dense_flash4.find_interface() if "flash4" not in refused else ""
    flash4 = None if isinstance(found, str) else Flash4Backend(found, device, dtype, head_dim)
    return CudaBackend(refused, flash4)


def _refuse_on_cuda(device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    reasons = {
        "flash4": dense_flash4.refuse(device, dtype, head_dim),
        "block_sparse": _refuse_lists(device, head_dim),
        "cudnn": _refuse_cudnn(device, head_dim),
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _refuse_lists(device: torch.device, head_dim: int) -> str | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "beats flash attention on compute capability 9.0"
    if head_dim not in (64, 128):
        return f"is fast for head dimensions 64 and 128, not {head_dim}"
    return None


def _refuse_cpu_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"does not take {dtype}"
    return None


def _causal(q_LHD: Tensor) -> Tensor:
    return torch.ones(len(q_LHD), len(q_LHD), dtype=torch.bool, device=q_LHD.device).tril()
