"""What one micro-batch's attention needs, as one object that travels through a model."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

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
    """Mask, layout and group of a micro-batch, the same for all of its layers.

    Attributes:
        mask: what may attend to what, over the group's packed stream.
        layout: which rank of the group holds which tokens of the stream.
        group: the ranks that carry out the attention.
        strategy: `local` for one rank, else one of those of `attention`.
        deterministic: bitwise the same result every time.
        num_padding: tokens at the end of this rank's tensors that belong to no document.
        ledger: counts what is sent.
        number: what compiled graphs know it by.
    """

    mask: Mask
    layout: Layout
    group: CommGroup
    strategy: str
    deterministic: bool = False
    num_padding: int = 0
    ledger: Ledger | None = None
    number: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", next(_numbers))
        _contexts[self.number] = self


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
