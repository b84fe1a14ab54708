"""Cross-entropy of a vocabulary projection whose logits exist only a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
#: Rows of a gradient that are scaled at a time.
SCALED_ROWS = 4096


def linear_cross_entropy(
    hidden_LC: Tensor,
    weight_VC: Tensor,
    labels_L: Tensor,
    *,
    weights_L: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T` against `labels`.

    The gradients are computed together with the loss, chunk by chunk, so that neither the logits
    nor their gradient of more than `chunk_tokens` tokens exist at once, and the backward needs no
    weight (which a sharded engine may have released by then).

    Args:
        hidden_LC: hidden states [L, C].
        weight_VC: projection [V, C].
        labels_L: int64 [L]; -100 marks a token that counts neither in loss nor gradient.
        weights_L: float32 [L], by which each token's loss counts; None: 1.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        A float32 scalar, attached to the graph also when no label is valid.

    Numerics: logits, loss and their gradient in float32 (float64 for float64 inputs); the weight's
    gradient adds up in float32 over the chunks.

    Source: the idea of gradients in the forward pass is Liger-Kernel's fused linear cross-entropy
    (arXiv 2410.10989); unlike there, an upstream gradient scales both results.
    """
    if hidden_LC.dim() != 2 or labels_L.shape != hidden_LC.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy takes hidden [L, C] and labels [L], got "
            f"{tuple(hidden_LC.shape)} and {tuple(labels_L.shape)}"
        )
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden_LC, weight_VC, labels_L, weights_L, chunk_tokens
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        chunk_tokens: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if need_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], labels[rows]
            log_probs = F.log_softmax((chunk @ weight.T).to(accumulate), dim=-1)
            by_token = None if weights is None else weights[rows].to(accumulate)
            loss += _weighted_loss(log_probs, target, by_token)
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = _grad_logits(log_probs, target, by_token).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk  # in the wider type of the two
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = scaled(grad_hidden, grad_loss, ctx.hidden_dtype)
        grad_weight = scaled(grad_weight, grad_loss, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A gradient times an upstream factor, which is not rounded to the gradient's dtype before.

    In parts, so that no second copy of a large gradient exists in a wider type.
    """
    if gradient is None:
        return None
    result = torch.empty_like(gradient, dtype=dtype)
    for whole, part in zip(result.split(SCALED_ROWS), gradient.split(SCALED_ROWS), strict=True):
        whole.copy_(part.to(factor.dtype) * factor)
    return result


def _weighted_loss(log_probs: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return F.nll_loss(log_probs, target, ignore_index=IGNORE_INDEX, reduction="sum")
    losses = F.nll_loss(log_probs, target, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * weights).sum()


def _grad_logits(log_probs: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """Softmax minus one-hot, times each row's weight, zero in rows that do not count.

    Overwrites `log_probs`.
    """
    valid = target != IGNORE_INDEX
    factor = (valid if weights is None else valid * weights).unsqueeze(-1)
    grad = log_probs.exp_()
    grad.scatter_add_(
        -1,
        target.clamp_min(0).unsqueeze(-1),
        torch.full_like(target, -1, dtype=grad.dtype).unsqueeze(-1),
    )
    return grad.mul_(factor)
