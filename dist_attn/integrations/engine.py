"""What the training loop asks of an engine, and the pieces of state that checkpoints hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dist_attn.config import Config

if TYPE_CHECKING:
    from dist_attn.integrations.hf import CausalLM
    from dist_attn.integrations.rotary import Frequencies

#: Where each engine lives; only the one that is configured is imported.
ENGINES = {
    "deepspeed": "dist_attn.integrations.deepspeed_engine:DeepSpeedEngine",
    "megatron": "dist_attn.integrations.megatron_engine:MegatronEngine",
}


@dataclass(frozen=True)
class Fragment:
    """A part of one parameter's float32 state, as live tensors of this rank.

    It is contiguous in the flattened parameter, or (`run`) the same columns of consecutive rows, as
    tensor parallelism cuts a matrix.

    Writing into the tensors changes the engine's state; `Engine.refresh` then carries the master
    weights over to the parameters that compute.
    """

    name: str
    shape: tuple[int, ...]
    #: First element, in the flattened parameter.
    start: int
    #: `param` and the optimizer's per-element states (`exp_avg`, ...), each 1-d of equal length.
    tensors: dict[str, Tensor]
    #: Whether this rank saves it; of a replicated fragment one rank does.
    owned: bool
    #: Elements of each row, whose rows follow each other at the parameter's row length; None for a
    #: contiguous fragment.
    run: int | None = None

    @property
    def numel(self) -> int:
        """Elements of the fragment."""
        return self.tensors["param"].numel()


class Engine(Protocol):
    """A sharded model with its optimizer, over all ranks."""

    def forward(self, **inputs: object) -> Tensor:
        """Sum of the local token losses of one micro-batch.

        `gradient_probe` among the inputs looks at the gradients of its embeddings.

        Collective: under ZeRO-3 by all ranks, the same number of times.
        """

    def set_rotary(self, found: Frequencies) -> None:
        """Turn queries and keys by other frequencies from the next forward on."""

    def backward(self, loss_sum: Tensor, valid_tokens: float, *, last: bool) -> None:
        """Accumulate the gradients of `loss_sum / valid_tokens` summed over all ranks.

        With weights of documents `valid_tokens` is a sum of weights.

        Collective: under ZeRO-2 and 3 by all ranks, the same number of times.
        """

    def step(self, lr: float) -> float:
        """Update the parameters; returns the gradients' global norm before clipping.

        Gradients that are not finite change nothing and are forgotten; the norm says so.

        Collective: by all ranks.
        """

    def fragments(self) -> list[Fragment]:
        """Every fragment whose state lives on this rank."""

    def refresh(self, optimizer_steps: int) -> None:
        """Take up fragments that were written into, after `optimizer_steps` updates.

        Collective: by all ranks.
        """

    def full_gradient(self, name: str) -> Tensor:
        """A parameter's whole gradient, float32, between `backward(last=True)` and `step`.

        Collective: by all ranks.
        """

    def close(self) -> None:
        """Release what the engine holds outside of its tensors."""


def engine_factory(name: str) -> Callable[[CausalLM, Config, torch.device], Engine]:
    """The class that makes an engine of a built model, imported when it is asked for."""
    module, attribute = ENGINES[name].split(":")
    factory: Any = getattr(importlib.import_module(module), attribute)
    return factory
