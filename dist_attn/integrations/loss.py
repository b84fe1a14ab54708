"""The vocabulary projection with its loss: Liger's fused kernel, or ours in torch's operations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn_kernels.linear_cross_entropy import linear_cross_entropy

#: From hidden states [L, C], projection [V, C], labels [L] and weights [L] or None to the sum.
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def loss_function(config: ModelConfig) -> LossFunction:
    """The loss that a model section asks for.

    Raises:
        ConfigError: Liger's is asked for and not installed.
    """
    if config.loss == "liger":
        return LigerLoss()
    return partial(_ours, chunk_tokens=config.loss_chunk_tokens)


def _ours(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, *, chunk_tokens: int
) -> Tensor:
    return linear_cross_entropy(
        hidden, weight, labels, weights_L=weights, chunk_tokens=chunk_tokens
    )


class LigerLoss:
    """Sum over tokens of Liger's fused linear cross-entropy, each token by its weight.

    Liger scales the gradients of a sum by what comes from above, in float32, which is all that the
    engines' scale needs. Weights of tokens are another thing: its `reduction="none"` computes the
    logits a second time and rounds the weights to the gradient's dtype. So the tokens of each
    different weight, of which there are as many as sources of documents, are summed by themselves.

    Numerics: logits and their gradient in the dtype of `hidden`, softmax and loss in float32; the
    weight's gradient adds up in float32 over the chunks and is rounded once per different weight.

    Source: Liger-Kernel (arXiv 2410.10989). It chooses the chunks by itself, so that the logits of
    one take about as much memory as `hidden`.
    """

    def __init__(self) -> None:
        try:
            module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
            self._apply: Any = module.LigerFusedLinearCrossEntropyFunction.apply
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"model.loss 'liger' needs the package liger-kernel ({error}); install it "
                f"(pip install liger-kernel), or set model.loss to 'torch'"
            ) from None

    def __call__(
        self, hidden_LC: Tensor, weight_VC: Tensor, labels_L: Tensor, weights_L: Tensor | None
    ) -> Tensor:
        """See `linear_cross_entropy`, of which this takes the place."""
        if not hidden_LC.shape[0]:
            return linear_cross_entropy(hidden_LC, weight_VC, labels_L)
        if weights_L is None:
            return self._sum(hidden_LC, weight_VC, labels_L)
        total = torch.zeros((), dtype=torch.float32, device=hidden_LC.device)
        for value in weights_L.unique():
            rows = torch.nonzero(weights_L == value).flatten()
            total = total + value * self._sum(hidden_LC[rows], weight_VC, labels_L[rows])
        return total

    def _sum(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # No bias and class weights; -100 counts nothing; nothing is smoothed or capped; the
        # weight's gradient adds up in float32.
        found = self._apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32
        )
        loss: Tensor = found[0]
        return loss
