"""Attention written out: scores, softmax, products. Slow, exact in float64, and for any mask."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_forward(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, allowed: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention with every score in memory.

    Args:
        q_LHD: queries.
        k_LKD: keys; the number of query heads is a multiple of theirs.
        v_LKD: values.
        allowed: bool, broadcast to [H, Lq, Lk]; None allows all.
        softmax_scale: factor of the scores.

    Returns:
        out [Lq, H, D] in the dtype of q, and its natural-log normaliser lse [H, Lq] (float32, or
        float64 for float64 inputs). A query without keys gets 0 and -inf.

    Numerics: float32 throughout for 16-bit inputs.
    """
    scores, v_HLD = _scores(q_LHD, k_LKD, v_LKD, allowed, softmax_scale)
    lse = scores.logsumexp(-1)
    out = _probabilities(scores, lse) @ v_HLD
    return out.transpose(0, 1).to(q_LHD.dtype), lse


def attention_backward(
    dout_LHD: Tensor,
    q_LHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    out_LHD: Tensor,
    lse_HL: Tensor,
    allowed: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for a given output and normaliser.

    `out_LHD` and `lse_HL` may come from a softmax over more keys than these; the result is then
    these keys' part of the gradients.
    """
    scores, v_HLD = _scores(q_LHD, k_LKD, v_LKD, allowed, softmax_scale)
    p = _probabilities(scores, lse_HL.to(scores.dtype))
    dout = dout_LHD.transpose(0, 1).to(scores.dtype)
    delta = (dout * out_LHD.transpose(0, 1)).sum(-1, keepdim=True)
    ds = p * (dout @ v_HLD.transpose(1, 2) - delta) * softmax_scale
    num_kv_heads, repeats = k_LKD.shape[1], q_LHD.shape[1] // k_LKD.shape[1]
    k = k_LKD.transpose(0, 1).to(scores.dtype).repeat_interleave(repeats, 0)
    dq = ds @ k
    dk = ds.transpose(1, 2) @ q_LHD.transpose(0, 1).to(scores.dtype)
    dv = p.transpose(1, 2) @ dout
    dk, dv = (g.unflatten(0, (num_kv_heads, repeats)).sum(1).transpose(0, 1) for g in (dk, dv))
    return dq.transpose(0, 1).to(q_LHD.dtype), dk.to(k_LKD.dtype), dv.to(v_LKD.dtype)


def _scores(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, allowed: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q_LHD.dtype, torch.float32)
    repeats = q_LHD.shape[1] // k_LKD.shape[1]
    q, k, v = (x.transpose(0, 1).to(dtype) for x in (q_LHD, k_LKD, v_LKD))
    k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
    scores = q @ k.transpose(1, 2) * softmax_scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores, v


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A query without keys has lse -inf; its probabilities are 0, not exp(-inf + inf).
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    return torch.exp(scores - safe[..., None])
