"""Where in a micro-batch a gradient that is not finite came up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class GradientProbe:
    """Looks at the gradient of each token's embedding as the backward pass ends there.

    Documents do not see each other, so a gradient that is not finite shows at the tokens of the
    document in which it came up, and at most at those that share a tile of the attention with it.
    """

    def __init__(self) -> None:
        #: float [L], the largest element of each token's gradient; None before the backward pass,
        #: and where embeddings are not trained.
        self._largest: Tensor | None = None

    @contextlib.contextmanager
    def on(self, embedding: nn.Module) -> Iterator[None]:
        """Look at what the module gives out in this block."""
        handle = embedding.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()

    def not_finite(self) -> Tensor:
        """Places of the tokens whose gradient is not finite, int64; waits for the device."""
        if self._largest is None:
            return torch.zeros(0, dtype=torch.int64)
        return (~torch.isfinite(self._largest)).nonzero().flatten().cpu()

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._see)

    def _see(self, gradient: Tensor) -> None:
        # In one pass, without a copy of the gradient.
        self._largest = torch.linalg.vector_norm(gradient, float("inf"), dim=-1).flatten()
