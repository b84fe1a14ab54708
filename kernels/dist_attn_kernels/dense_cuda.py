"""Dense backends on CUDA devices: cuDNN, packed flash attention, and the choice between them."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_attn_kernels.segments import (
    Backend,
    PerSegment,
    Saved,
    Segments,
    bhld,
    deterministic_kernels,
)

aten = torch.ops.aten


class CudnnBackend(PerSegment):
    """cuDNN's fused attention, one call per segment: for few and long ones."""

    name = "cudnn"

    def forward_one(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `PerSegment`."""
        result = aten._scaled_dot_product_cudnn_attention(
            bhld(q_LHD), bhld(k_LKD), bhld(v_LKD), None, True, 0.0, causal, False,
            scale=softmax_scale,
        )  # fmt: skip
        # The normaliser comes as [1, H, L, 1] or [1, H, L].
        return result[0][0].transpose(0, 1), result[1].reshape(q_LHD.shape[1], -1)

    def backward_one(
        self, saved: Saved, causal: bool, softmax_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `PerSegment`."""
        s = saved
        no_dropout = torch.zeros((), dtype=torch.int64, device=s.q.device)
        num_q, num_k = s.q.shape[0], s.k.shape[0]
        lse = s.lse.contiguous()[None, :, :, None]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            bhld(s.dout), bhld(s.q), bhld(s.k), bhld(s.v), bhld(s.out),
            lse, no_dropout, no_dropout, None, None, None, num_q, num_k, 0.0, causal,
            scale=softmax_scale,
        )  # fmt: skip
        return tuple(g[0].transpose(0, 1) for g in grads)


class FlashBackend:
    """`aten._flash_attention_forward` over packed segments: FA2, or what torch has put under it."""

    name = "flash"

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if q_LHD.shape[0] == 0 or k_LKD.shape[0] == 0:
            return _nothing_to_see(q_LHD)
        dim = q_LHD.shape[-1]
        q, k, v = (_pad_dim(x) for x in (q_LHD, k_LKD, v_LKD))
        cu_q, cu_k = segments.cu_seqlens(q.device)
        max_q, max_k = segments.max_seqlens
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, segments.causal, False, scale=softmax_scale
        )
        if segments.has_empty_keys:
            # It marks queries without keys by +inf.
            lse = lse.masked_fill(torch.isposinf(lse), float("-inf"))
        return out[..., :dim], lse

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        s = saved
        if s.q.shape[0] == 0 or s.k.shape[0] == 0:
            return torch.zeros_like(s.q), torch.zeros_like(s.k), torch.zeros_like(s.v)
        dim = s.q.shape[-1]
        dout, q, k, v, out = (_pad_dim(x) for x in (s.dout, s.q, s.k, s.v, s.out))
        cu_q, cu_k = segments.cu_seqlens(q.device)
        max_q, max_k = segments.max_seqlens
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with deterministic_kernels(deterministic):
            grads = aten._flash_attention_backward(
                dout.contiguous(), q, k, v, out.contiguous(), s.lse.contiguous(), cu_q, cu_k,
                max_q, max_k, 0.0, segments.causal, rng, rng, scale=softmax_scale,
            )  # fmt: skip
        return tuple(g[..., :dim] for g in grads)


class CudaBackend:
    """cuDNN for long segments, packed flash attention for the rest.

    cuDNN is up to twice as fast, but builds a plan for every new shape. So flash attention takes a
    shape until it has lost about as much time as the plan takes, and cuDNN from then on: at worst
    twice as slow as knowing beforehand. In deterministic calls flash attention does all.
    """

    name = "cuda"
    #: Scores of one shape after which its plans have paid for themselves. Measured on an H100 with
    #: head dimension 128: plans for forward and backward 150 ms; 345 / 290 TFLOP/s by flash
    #: attention, 660 / 560 by cuDNN; so 5e10 scores, there and back.
    plan_scores = 2**36
    #: Shapes that are remembered.
    max_shapes = 4096

    def __init__(self, cudnn_refusal: str | None) -> None:
        self.cudnn_refusal = cudnn_refusal
        self.cudnn, self.flash = CudnnBackend(), FlashBackend()
        self._scores: dict[tuple[int, int, int, bool], int] = {}

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        parts = [
            backend.forward(q_LHD[q], k_LKD[k], v_LKD[k], run, softmax_scale)
            for backend, run, q, k in self._runs(segments, q_LHD.shape[1])
        ]
        outs, lses = zip(*parts, strict=True)
        return _join(outs, 0), _join(lses, 1)

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        if deterministic:
            return self.flash.backward(saved, segments, softmax_scale, deterministic)
        parts = [
            backend.backward(saved.segment(q, k), run, softmax_scale, deterministic)
            for backend, run, q, k in self._runs(segments, saved.q.shape[1])
        ]
        dqs, dks, dvs = zip(*parts, strict=True)
        return _join(dqs, 0), _join(dks, 0), _join(dvs, 0)

    def _runs(
        self, segments: Segments, num_heads: int
    ) -> list[tuple[Backend, Segments, slice, slice]]:
        """Cut the call where the backend changes."""
        use_cudnn = [self._pays(q, k, segments.causal, num_heads) for q, k in segments]
        runs: list[tuple[Backend, Segments, slice, slice]] = []
        first = 0
        while first < len(use_cudnn) or not runs:
            last = first
            while last + 1 < len(use_cudnn) and use_cudnn[last + 1] == use_cudnn[first]:
                last += 1
            run = segments.cut(first, last + 1)
            q = slice(segments.cu_q[first], segments.cu_q[first] + run.cu_q[-1])
            k = slice(segments.cu_k[first], segments.cu_k[first] + run.cu_k[-1])
            chosen = any(use_cudnn[first : last + 1])
            runs.append((self.cudnn if chosen else self.flash, run, q, k))
            first = last + 1
        return runs

    def _pays(self, q: slice, k: slice, causal: bool, num_heads: int) -> bool:
        num_q, num_k = q.stop - q.start, k.stop - k.start
        if self.cudnn_refusal is not None or min(num_q, num_k) < 1024:
            return False
        shape = (num_q, num_k, num_heads, causal)
        if len(self._scores) >= self.max_shapes:
            self._scores.clear()
        scores = num_heads * num_q * num_k // (2 if causal else 1)
        self._scores[shape] = self._scores.get(shape, 0) + scores
        return self._scores[shape] >= self.plan_scores


def _pad_dim(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _nothing_to_see(q_LHD: Tensor) -> tuple[Tensor, Tensor]:
    lse = q_LHD.new_full((q_LHD.shape[1], q_LHD.shape[0]), float("-inf"), dtype=torch.float32)
    return torch.zeros_like(q_LHD), lse


def _join(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
