"""What one micro-batch's attention needs, as one object that travels through a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch

from dist_attn.comm.ledger import Ledger
from dist_attn.errors import PlanError
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask

_numbers = itertools.count()


class KeptAttention:
    """What one layer's attention gave, from the forward to the layer's recomputation.

    Put into the context of a layer that is checkpointed, it lets the second forward take what the
    first one computed: neither kernel nor ring runs again. A strategy that deals with some heads at
    a time keeps a result for each of these parts.
    """

    def __init__(self) -> None:
        self._results: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def put(self, heads: tuple[int, ...], out: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep the result of some heads, apart from the graph that it will belong to."""
        self._results[heads] = out.detach(), lse.detach()

    def take(self, heads: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What was kept of these heads, once; None in the first forward."""
        return self._results.pop(heads, None)


# A compiled graph carries tensors and numbers only; this is its way back from a number to an
# object. Contexts leave it when nobody else has them.
_contexts: WeakValueDictionary[int, AttentionContext] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Mask, layout and group of a micro-batch; layers may have masks of their own.

    Attributes:
        mask: what may attend to what, over the group's packed stream.
        layout: which rank of the group holds which tokens of the stream.
        group: the ranks that carry out the attention.
        strategy: `local` for one rank, else one of those of `attention`.
        deterministic: bitwise the same result every time.
        num_padding: tokens at the end of this rank's tensors that belong to no document.
        gradient_dtype: in what gradients of keys and values travel, by default float32.
        ledger: counts what is sent.
        kept: where a checkpointed layer keeps its attention; None to compute it again.
        layers: a context for each layer, with masks of their own; empty where all are alike.
        parts: where the rank works in several groups, the context of each, without padding. Its
            tokens lie part after part; mask, layout, group and strategy are then those of the
            parts. All ranks of a group have it at the same place among their common groups.
        number: what compiled graphs know it by.
    """

    mask: Mask
    layout: Layout
    group: CommGroup
    strategy: str
    deterministic: bool = False
    num_padding: int = 0
    gradient_dtype: torch.dtype | None = None
    ledger: Ledger | None = None
    kept: KeptAttention | None = None
    layers: tuple[AttentionContext, ...] = ()
    parts: tuple[AttentionContext, ...] = ()
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", next(_numbers))
        _contexts[self.number] = self

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank that belong to documents."""
        if self.parts:
            return sum(p.num_tokens for p in self.parts)
        return self.layout.local_seq_len(self.group.cp_rank)

    def of_layer(self, layer: int) -> AttentionContext:
        """Return the context of a layer, counted from 0."""
        if not self.layers:
            return self
        if self.kept is None:
            return self.layers[layer]
        return replace(self.layers[layer], kept=self.kept)


def context_of(number: int) -> AttentionContext:
    """Return the context of a number.

    Raises:
        PlanError: nobody has it any more.
    """
    context = _contexts.get(number)
    if context is None:
        raise PlanError(
            "the AttentionContext of a compiled call is gone; keep it until the backward is done"
        )
    return context
