"""What one micro-batch's attention needs, as one object that travels through a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from dist_attn.comm.ledger import Ledger
from dist_attn.errors import PlanError
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask

_numbers = itertools.count()
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
        return self.layers[layer] if self.layers else self


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
