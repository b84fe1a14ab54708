"""What one micro-batch's attention needs, as one object that travels through a model."""

from __future__ import annotations

from dataclasses import dataclass

from dist_attn.comm.ledger import Ledger
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Mask


@dataclass(frozen=True)
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
    """

    mask: Mask
    layout: Layout
    group: CommGroup
    strategy: str
    deterministic: bool = False
    num_padding: int = 0
    ledger: Ledger | None = None
