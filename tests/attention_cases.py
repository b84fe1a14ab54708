"""Attention cases for tests: documents, their tensors, and what attention should return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_attn.masks import Mask

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """The shape of one attention call over a packed stream."""

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    scale_of_q: float = 1.0
    seed: int = 0

    @property
    def cu_seqlens(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    @property
    def seq_len(self) -> int:
        return sum(self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v and dout of the whole stream, in the case's dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {
            "q": self.num_heads,
            "k": self.num_kv_heads,
            "v": self.num_kv_heads,
            "dout": self.num_heads,
        }
        made = {
            name: torch.randn(self.seq_len, heads, self.head_dim, generator=generator)
            for name, heads in shapes.items()
        }
        made["q"] *= self.scale_of_q
        return {name: x.to(self.dtype) for name, x in made.items()}


def dense_mask(mask: Mask, case: Case) -> Tensor:
    """bool [H, S, S]."""
    heads = [torch.from_numpy(mask.materialize(case.seq_len, h)) for h in range(case.num_heads)]
    return torch.stack(heads)


def exact(case: Case, allowed: Tensor) -> dict[str, Tensor]:
    """Output, lse and gradients in float64, written out."""
    x = {name: t.double() for name, t in case.tensors().items()}
    for name in "qkv":
        x[name].requires_grad_()
    repeats = case.num_heads // case.num_kv_heads
    q, k, v = (x[n].transpose(0, 1) for n in "qkv")
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = (q @ k.transpose(1, 2) * case.head_dim**-0.5).masked_fill(~allowed, float("-inf"))
    has_keys = allowed.any(-1, keepdim=True)
    p = torch.where(has_keys, scores.masked_fill(~has_keys, 0.0).softmax(-1), 0.0)
    out = (p @ v).transpose(0, 1)
    out.backward(x["dout"])
    grads = {f"d{n}": x[n].grad for n in "qkv"}
    lse = torch.where(has_keys[..., 0], scores.logsumexp(-1), float("-inf"))
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def plain_torch(case: Case, allowed: Tensor) -> dict[str, Tensor]:
    """What torch's own attention returns for the whole stream at the case's dtype."""
    x = case.tensors()
    for name in "qkv":
        x[name].requires_grad_()
    q, k, v = (x[n].transpose(0, 1)[None] for n in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None], enable_gqa=True)
    out = out[0].transpose(0, 1).nan_to_num()
    out.backward(x["dout"])
    return {"out": out.detach(), **{f"d{n}": x[n].grad.nan_to_num() for n in "qkv"}}


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def assert_as_good_as_torch(got: dict[str, Tensor], case: Case, allowed: Tensor) -> None:
    """Every error is at most twice plain torch's, plus one rounding of the dtype."""
    want, plain = exact(case, allowed), plain_torch(case, allowed)
    rounding = torch.finfo(case.dtype).eps
    for name in NAMES:
        bound = 2 * error(plain[name], want[name]) + rounding
        found = error(got[name], want[name])
        assert found <= bound, f"{name}: error {found:.2e}, allowed {bound:.2e}"
