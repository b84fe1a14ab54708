"""Dense backends on CUDA devices: cuDNN, packed flash attention, and the choice among all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.attention
from torch import Tensor

from dist_attn_kernels.dense_flash4 import Flash4Backend
from dist_attn_kernels.dense_lists import ListsBackend
from dist_attn_kernels.segments import (
    Backend,
    PerSegment,
    Saved,
    Segments,
    bhld,
    deterministic_kernels,
)

aten = torch.ops.aten

#: Tokens on both sides from which cuDNN is worth a plan.
MIN_CUDNN_TOKENS = 1024


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
    """Chooses per call: flash-attn-4, block-sparse kernels, cuDNN for long segments, torch's flash.

    Where flash-attn-4 is installed it takes every call but deterministic backwards. Of the others
    the first two are up to twice as fast on Hopper, but want lists built for every new call and
    plans for every new shape. So flash attention takes a call or a shape until it has lost about as
    much time as that takes, and the others from then on: at worst twice as slow as knowing
    beforehand. Where several would do, the block-sparse kernels go first: they take all segments
    at once, and their gradients repeat bit by bit. cuDNN is ahead in the backward of long segments.

    Args:
        refused: why the backends "flash4", "block_sparse" and "cudnn" are never used, by name.
        flash4: flash-attn-4, or None where it is refused.
    """

    name = "cuda"
    #: Scores of one shape after which its plans have paid for themselves. Measured on an H100 with
    #: head dimension 128: plans for forward and backward 150 ms; 345 / 290 TFLOP/s by flash
    #: attention, 660 / 560 by cuDNN; so 5e10 scores, there and back.
    plan_scores = 2**36
    #: Scores of one call after which its lists have paid for themselves. Measured likewise: lists
    #: of documents in 64k tokens 10 ms; 335 / 296 TFLOP/s by flash attention, 588 / 442 by lists.
    list_scores = 2**32
    #: Scores of a head up to which lists are built: they grow like these, 2 bytes for a thousand.
    max_list_scores = 2**31
    #: Tokens on both sides from which all segments go to cuDNN in a backward that need not repeat
    #: bit by bit. Measured on an H100, causal 32k: 556 TFLOP/s against 493 by lists, while the
    #: forward has 628 against 646.
    long_tokens = 8192
    #: Shapes that are remembered.
    max_shapes = 4096

    def __init__(self, refused: Mapping[str, str], flash4: Flash4Backend | None = None) -> None:
        self.refused = dict(refused)
        self.flash4 = flash4
        self.lists, self.cudnn, self.flash = ListsBackend(), CudnnBackend(), FlashBackend()
        self._scores: dict[tuple[int, bool], dict[tuple[int, int], int]] = {}

    def forward(
        self, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, segments: Segments, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `Backend`."""
        if self.why_not_flash4(segments, q_LHD.shape[1] // k_LKD.shape[1]) is None:
            assert self.flash4 is not None
            return self.flash4.forward(q_LHD, k_LKD, v_LKD, segments, softmax_scale)
        parts = [
            backend.forward(q_LHD[q], k_LKD[k], v_LKD[k], run, softmax_scale)
            for backend, run, q, k in self._runs(segments, q_LHD.shape[1], False)
        ]
        outs, lses = zip(*parts, strict=True)
        return _join(outs, 0), _join(lses, 1)

    def backward(
        self, saved: Saved, segments: Segments, softmax_scale: float, deterministic: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend`."""
        group = saved.q.shape[1] // saved.k.shape[1]
        if not deterministic and self.why_not_flash4(segments, group) is None:
            assert self.flash4 is not None
            return self.flash4.backward(saved, segments, softmax_scale, deterministic)
        parts = [
            backend.backward(saved.segment(q, k), run, softmax_scale, deterministic)
            for backend, run, q, k in self._backward_runs(segments, saved.q.shape[1], deterministic)
        ]
        dqs, dks, dvs = zip(*parts, strict=True)
        return _join(dqs, 0), _join(dks, 0), _join(dvs, 0)

    def _backward_runs(
        self, segments: Segments, num_heads: int, deterministic: bool
    ) -> list[tuple[Backend, Segments, slice, slice]]:
        shortest = min((min(shape) for shape, _ in segments.shapes), default=0)
        if not deterministic and shortest >= self.long_tokens:
            use_cudnn = self._paid(segments, num_heads)
            if use_cudnn and all(use_cudnn):
                whole = slice(0, segments.cu_q[-1]), slice(0, segments.cu_k[-1])
                return [(self.cudnn, segments, *whole)]
        return self._runs(segments, num_heads, deterministic)

    def why_not_flash4(self, segments: Segments, group: int) -> str | None:
        """Say why flash-attn-4 does not take a call of `group` query heads a key head, or None."""
        if self.flash4 is None:
            return self.refused.get("flash4", "flash-attn-4 was not looked for")
        active = active_flash()
        if active is not None:
            return f"the user put {active} under torch's flash attention"
        return self.flash4.why_not(segments, group)

    def why_not_lists(self, segments: Segments, num_heads: int) -> str | None:
        """Say why the block-sparse kernels do not take a call now, or None if they do."""
        if "block_sparse" in self.refused:
            return self.refused["block_sparse"]
        if segments.cu_q[-1] == 0 or segments.cu_k[-1] == 0:
            return "there is nothing to compute"
        if segments.num_scores > self.max_list_scores:
            return f"lists for {segments.num_scores:.1e} scores a head would be large"
        active = active_flash()
        if active is not None:
            return f"flash attention is {active} here, which is faster"
        seen = segments.kept.get("scores", 0)
        assert isinstance(seen, int)
        if num_heads * (seen + segments.num_scores) < self.list_scores:
            return f"lists pay from {self.list_scores:.1e} scores of one call"
        return None

    def _runs(
        self, segments: Segments, num_heads: int, deterministic: bool
    ) -> list[tuple[Backend, Segments, slice, slice]]:
        """Cut the call where the backend changes."""
        whole = slice(0, segments.cu_q[-1]), slice(0, segments.cu_k[-1])
        if self.why_not_lists(segments, num_heads) is None:
            return [(self.lists, segments, *whole)]
        seen = segments.kept.get("scores", 0)
        assert isinstance(seen, int)
        segments.kept["scores"] = seen + segments.num_scores
        if deterministic:
            return [(self.flash, segments, *whole)]
        use_cudnn = self._paid(segments, num_heads)
        kept = segments.kept.get(("runs", use_cudnn))
        if kept is None:
            kept = segments.kept["runs", use_cudnn] = _cut(segments, use_cudnn)
        assert isinstance(kept, list)
        return [(self.cudnn if cudnn else self.flash, *run) for cudnn, *run in kept]

    def _paid(self, segments: Segments, num_heads: int) -> tuple[bool, ...]:
        """Count each segment's scores; which segments go to cuDNN."""
        if "cudnn" in self.refused or min(segments.max_seqlens) < MIN_CUDNN_TOKENS:
            return ()
        seen = self._scores.setdefault((num_heads, segments.causal), {})
        if len(seen) >= self.max_shapes:
            seen.clear()
        paid = []
        for shape, scores in segments.shapes:
            if min(shape) < MIN_CUDNN_TOKENS:
                paid.append(False)
                continue
            seen[shape] = total = seen.get(shape, 0) + scores * num_heads
            paid.append(total >= self.plan_scores)
        return tuple(paid) if True in paid else ()


def _cut(
    segments: Segments, use_cudnn: tuple[bool, ...]
) -> list[tuple[bool, Segments, slice, slice]]:
    """Parts of a call by whether cuDNN takes them; no flags: it takes none."""
    flags = use_cudnn or (False,) * len(segments)
    runs: list[tuple[bool, Segments, slice, slice]] = []
    first = 0
    while first < len(flags) or not runs:
        last = first
        while last + 1 < len(flags) and flags[last + 1] == flags[first]:
            last += 1
        run = segments.cut(first, last + 1)
        q = slice(segments.cu_q[first], segments.cu_q[first] + run.cu_q[-1])
        k = slice(segments.cu_k[first], segments.cu_k[first] + run.cu_k[-1])
        runs.append((any(flags[first : last + 1]), run, q, k))
        first = last + 1
    return runs


def active_flash() -> str | None:
    """The flash attention that the user put under torch's ("FA3", "FA4"), or None for FA2."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def _pad_dim(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def _nothing_to_see(q_LHD: Tensor) -> tuple[Tensor, Tensor]:
    lse = q_LHD.new_full((q_LHD.shape[1], q_LHD.shape[0]), float("-inf"), dtype=torch.float32)
    return torch.zeros_like(q_LHD), lse


def _join(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
