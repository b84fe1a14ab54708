"""One rank's tensors of one micro-batch, from the plan and the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dist_attn.data.indexed import IntArray
from dist_attn.data.mixture import AnyCorpus
from dist_attn.layout import Layout, make_layout
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.plan import Group

#: The label of a token after which nothing is predicted, as in torch's cross-entropy.
IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class LocalBatch:
    """What a rank's model call and its attention need.

    The first `local_seq_len` of the L tokens belong to documents, in the order of their positions
    in the group's packed stream; the last `num_padding` belong to none.
    """

    #: int64 [1, L].
    input_ids: torch.Tensor
    #: int64 [1, L], the token that follows in the document, wherever the layout put it; -100 at a
    #: document's last token and at padding.
    shift_labels: torch.Tensor
    #: int64 [1, L], restarting at 0 in each document; 0 at padding.
    position_ids: torch.Tensor
    #: int64 [1, L], the length of each token's document; 1 at padding.
    document_tokens: torch.Tensor
    #: float32 [1, L], by which each token's loss counts; None: all alike.
    loss_weights: torch.Tensor | None
    #: int32 [num_docs + 1], boundaries of the documents in the group's packed stream.
    cu_seqlens: torch.Tensor
    #: Longest document of the group.
    max_seqlen: int
    layout: Layout
    cp_rank: int
    strategy: str
    num_padding: int
    #: Labels on this rank that are not -100.
    num_valid: int
    #: Where the rank works in several groups (`free` placement): the batch of each, whose tokens
    #: lie one after the other. `layout`, `cu_seqlens` and `strategy` are then those of the parts.
    parts: tuple[LocalBatch, ...] = ()

    @property
    def local_seq_len(self) -> int:
        """Tokens of documents on this rank, without padding."""
        return self.layout.local_seq_len(self.cp_rank)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LocalBatch:
        """Copy the model's inputs to a device; `cu_seqlens` stays on the host.

        A copy that does not block comes from pinned memory, so that the host need not wait for
        what the device does before.
        """
        pinned = non_blocking and torch.device(device).type == "cuda"

        def there(x: torch.Tensor) -> torch.Tensor:
            return (x.pin_memory() if pinned else x).to(device, non_blocking=non_blocking)

        return replace(
            self,
            input_ids=there(self.input_ids),
            shift_labels=there(self.shift_labels),
            position_ids=there(self.position_ids),
            document_tokens=there(self.document_tokens),
            loss_weights=None if self.loss_weights is None else there(self.loss_weights),
        )


def build_local_batch(
    corpus: AnyCorpus,
    document_ids: Sequence[int] | IntArray,
    group: Group | None,
    *,
    cp_rank: int = 0,
    layout_kind: str = "zigzag",
    pad_to_multiple: int = 1,
    rules: LayerRules | None = None,
) -> LocalBatch:
    """Read this rank's share of a group's documents.

    Only this rank's tokens, and the one that follows each of them, are read.

    Args:
        corpus: the documents.
        document_ids: the global batch that was planned; the plan's documents index into it.
        group: the group that this rank works in, or None where it idles.
        cp_rank: this rank's place in `group.ranks`.
        layout_kind: how the packed stream is dealt out; see `dist_attn.layout.make_layout`. Not
            used where the group has shares: they say it.
        pad_to_multiple: padding is added up to a multiple of this, and to at least one token, so
            that a rank without tokens still makes the calls that the others wait for. 0: none.
        rules: what layers see, for the `balanced` layout; None where all are causal.
    """
    degree = 1 if group is None else group.degree
    assert 0 <= cp_rank < degree
    assert pad_to_multiple >= 0
    chosen = np.array([] if group is None else group.documents, np.int64)
    documents = np.asarray(document_ids, np.int64)[chosen]
    lengths = corpus.lengths[documents]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    if group is not None and group.shares:
        layout = make_layout("placed", cu_seqlens, degree, shares=np.array(group.shares))
    else:
        areas = None
        if layout_kind == "balanced" and rules is not None:
            areas = rules.chunk_areas(cu_seqlens)
        layout = make_layout(layout_kind, cu_seqlens, degree, chunk_areas=areas)

    stream = layout.positions(cp_rank)
    which = np.searchsorted(cu_seqlens, stream, side="right") - 1
    positions = stream - cu_seqlens[which]
    tokens = corpus.gather(documents[which], positions)
    has_next = positions + 1 < lengths[which]
    labels = np.full(len(stream), IGNORE_INDEX, np.int64)
    labels[has_next] = corpus.gather(documents[which[has_next]], positions[has_next] + 1)

    num_padding = _padding(len(stream), pad_to_multiple)
    return LocalBatch(
        input_ids=_row(tokens, num_padding, 0),
        shift_labels=_row(labels, num_padding, IGNORE_INDEX),
        position_ids=_row(positions, num_padding, 0),
        document_tokens=_row(lengths[which], num_padding, 1),
        loss_weights=None
        if corpus.loss_weights is None
        else _row(corpus.loss_weights[documents[which]], num_padding, 0),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max(initial=0)),
        layout=layout,
        cp_rank=cp_rank,
        strategy="local" if group is None else group.strategy,
        num_padding=num_padding,
        num_valid=int(has_next.sum()),
    )


def join_batches(parts: Sequence[LocalBatch], pad_to_multiple: int = 1) -> LocalBatch:
    """One batch of a rank that works in several groups; the parts have no padding."""
    assert parts
    assert not any(p.num_padding for p in parts)
    num_tokens = sum(p.local_seq_len for p in parts)
    num_padding = _padding(num_tokens, pad_to_multiple)

    def joined(rows: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(torch.cat(rows, dim=1), (0, num_padding), value=fill)

    weights = [p.loss_weights for p in parts if p.loss_weights is not None]
    bounds = np.array([0, num_tokens], np.int64)
    return LocalBatch(
        input_ids=joined([p.input_ids for p in parts], 0),
        shift_labels=joined([p.shift_labels for p in parts], IGNORE_INDEX),
        position_ids=joined([p.position_ids for p in parts], 0),
        document_tokens=joined([p.document_tokens for p in parts], 1),
        loss_weights=joined(weights, 0) if len(weights) == len(parts) else None,
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=max(p.max_seqlen for p in parts),
        layout=make_layout("contiguous", bounds, 1),
        cp_rank=0,
        strategy="local",
        num_padding=num_padding,
        num_valid=sum(p.num_valid for p in parts),
        parts=tuple(parts),
    )


def _padding(num_tokens: int, multiple: int) -> int:
    return max(-(-num_tokens // multiple), 1) * multiple - num_tokens if multiple else 0


def valid_tokens(lengths: Sequence[int] | IntArray) -> int:
    """Predicted tokens of a batch of documents: all but the first of each."""
    return int(np.maximum(np.asarray(lengths, np.int64) - 1, 0).sum())


def valid_weight(corpus: AnyCorpus, document_ids: Sequence[int] | IntArray) -> float:
    """Predicted tokens of a batch of documents, each by its document's weight."""
    documents = np.asarray(document_ids, np.int64)
    predicted = np.maximum(corpus.lengths[documents] - 1, 0)
    if corpus.loss_weights is None:
        return float(predicted.sum())
    return float((predicted * corpus.loss_weights[documents].astype(np.float64)).sum())


def _row(values: np.ndarray, num_padding: int, fill: int) -> torch.Tensor:
    return torch.from_numpy(np.pad(values, (0, num_padding), constant_values=fill)[None])
