"""Chunked cross-entropy of a vocabulary projection whose rows are divided among tensor ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_attn_kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, scaled


def vocab_parallel_linear_cross_entropy(
    hidden_LC: Tensor,
    weight_VC: Tensor,
    labels_L: Tensor,
    *,
    first_row: int,
    group: dist.ProcessGroup,
    weights_L: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T`, rows of `weight` on all ranks.

    Gradients are computed chunk by chunk with the loss, as in `linear_cross_entropy`.

    Args:
        hidden_LC: hidden states [L, C], the same on every rank of the group.
        weight_VC: this rank's rows of the projection, of any number; padding rows left out.
        labels_L: int64 [L]; -100 marks a token that does not count.
        first_row: vocabulary index of this rank's first row.
        group: the ranks that hold the other rows.
        weights_L: float32 [L], by which each token's loss counts; None: 1.
        chunk_tokens: tokens whose logits exist at a time.

    Returns:
        A float32 scalar, the same on every rank.

    Collective: by all ranks of the group; per chunk a maximum [l] and a sum [2, l] in float32, and
    one sum [L, C] for the gradient of `hidden`.

    Numerics: logits, loss and their gradient in float32 (float64 for float64 inputs).
    """
    if group.size() == 1:
        return linear_cross_entropy(
            hidden_LC, weight_VC, labels_L, weights_L=weights_L, chunk_tokens=chunk_tokens
        )
    if weights_L is None:
        weights_L = torch.ones_like(labels_L, dtype=torch.float32)
    loss: Tensor = _VocabParallel.apply(
        hidden_LC, weight_VC, labels_L, weights_L, first_row, group, chunk_tokens
    )
    return loss


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        first_row: int,
        group: dist.ProcessGroup,
        chunk_tokens: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if need_weight else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = hidden[rows]
            logits = (chunk @ weight.T).to(accumulate)
            losses, grad = _chunk(logits, labels[rows], first_row, group)
            by_token = weights[rows].to(accumulate)
            loss += (losses * by_token).sum()
            grad_logits = grad.mul_(by_token.unsqueeze(-1)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ chunk  # in the wider type of the two
        if grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.hidden_dtype, ctx.weight_dtype = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = scaled(grad_hidden, grad_loss, ctx.hidden_dtype)
        grad_weight = scaled(grad_weight, grad_loss, ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk(
    logits: Tensor, labels: Tensor, first_row: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Losses of a chunk's tokens, and the gradient of this rank's logits; overwrites `logits`."""
    num_rows = logits.shape[1]
    valid = labels != IGNORE_INDEX
    mine = valid & (labels >= first_row) & (labels < first_row + num_rows)
    row = (labels - first_row).clamp(0, max(num_rows - 1, 0)).unsqueeze(-1)
    highest = logits.amax(-1) if num_rows else logits.new_full(labels.shape, -torch.inf)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    logits -= highest.unsqueeze(-1)
    target = torch.zeros_like(highest)
    if num_rows:
        target = logits.gather(-1, row).squeeze(-1) * mine
    exp = logits.exp_()
    sums = torch.stack((exp.sum(-1), target))
    dist.all_reduce(sums, group=group)
    denominator, target = sums
    losses = (denominator.log() - target) * valid
    grad = exp.div_(denominator.unsqueeze(-1))
    if num_rows:
        grad.scatter_add_(-1, row, -mine.to(grad.dtype).unsqueeze(-1))
    return losses, grad.mul_(valid.unsqueeze(-1))
