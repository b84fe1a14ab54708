"""Checkpointing of layers: what is kept of a layer's forward for its backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_attn.attention.context import AttentionContext, KeptAttention
from dist_attn.config import ModelConfig
from dist_attn.integrations.offload import HostOffload


@dataclass(frozen=True)
class Recompute:
    """Computes a layer again in its backward.

    Its input is kept and, with `keep_attention`, what its attention gave, so that the second
    forward costs the layer's matrix products but neither attention nor communication.
    """

    keep_attention: bool
    #: Moves the layers' inputs to the host until the backward.
    offload: HostOffload | None = None

    @classmethod
    def from_config(cls, config: ModelConfig) -> Recompute | None:
        """What a model section asks for; None where layers keep everything."""
        if not config.gradient_checkpointing:
            return None
        return cls(config.keep_attention, HostOffload() if config.offload_checkpoints else None)

    def call(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer under a checkpoint.

        Args:
            layer: the layer's own forward.
            args: its inputs that need gradients.
            kwargs: the others, with the `attention_context` among them.
        """
        if "hidden_states" in kwargs:
            # What is kept are positional arguments.
            args = (kwargs.pop("hidden_states"), *args)
            layer = _with_named_input(layer)
        with self.offload.keeping() if self.offload is not None else nullcontext():
            # No dropout: there is no random state to keep.
            return checkpoint(
                partial(layer, **kwargs), *args, use_reentrant=False, preserve_rng_state=False
            )

    def transformers(self, layer: Callable[..., Any], *args: Any) -> Any:
        """`call` as transformers makes it: a partial with the layer's keywords, and its input."""
        assert isinstance(layer, partial)
        keywords = dict(layer.keywords)
        keywords["attention_context"] = self.context(keywords["attention_context"])
        return self.call(layer.func, *layer.args, *args, **keywords)

    def context(self, context: AttentionContext) -> AttentionContext:
        """The context of one layer's two forwards."""
        return replace(context, kept=KeptAttention()) if self.keep_attention else context


def _with_named_input(layer: Callable[..., Any]) -> Callable[..., Any]:
    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return layer(*args, hidden_states=hidden_states, **kwargs)

    return call
