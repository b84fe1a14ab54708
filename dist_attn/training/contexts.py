"""The attention contexts of micro-batches, and the lists of the next one made ahead."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dist_attn.attention.context import AttentionContext
from dist_attn.attention.prepare import Heads, Part, Preparer
from dist_attn.comm.ledger import Ledger
from dist_attn.config import Config
from dist_attn.data import LocalBatch
from dist_attn.groups import CommGroup
from dist_attn.layout import Layout
from dist_attn.masks import Causal, Documents, Mask
from dist_attn.masks.layers import LayerRules
from dist_attn.planner.plan import Group
from dist_attn.planner.shape import ModelShape
from dist_attn.training.topology import Topology

#: Streams whose masks are kept, and with them the lists that were made of them.
KEPT_STREAMS = 16
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class Stream:
    """Layout and masks of a packed stream; what is worked out from them hangs on these objects."""

    layout: Layout
    #: Of layers without rules of their own.
    whole: Mask
    by_layer: tuple[Mask, ...] = ()

    @classmethod
    def of(cls, batch: LocalBatch, rules: LayerRules | None) -> Stream:
        """Causal inside each document, or as rules say; layers of one rule share a mask."""
        cu_seqlens = batch.cu_seqlens.numpy()
        whole = Documents(cu_seqlens) & Causal()
        if rules is None:
            return cls(batch.layout, whole)
        by_rule = {rule: rules.mask(rule, cu_seqlens) for rule in rules.distinct}
        return cls(batch.layout, whole, tuple(by_rule[rule] for rule in rules.of_layer))

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks of the layers, each once."""
        return tuple({id(m): m for m in self.by_layer or (self.whole,)}.values())


class Streams:
    """Streams by what they are: those of equal documents in an equal layout are one object.

    Packed documents of one length, cut from longer ones, come in every micro-batch.
    """

    def __init__(self, rules: LayerRules | None, capacity: int = KEPT_STREAMS) -> None:
        self._rules = rules
        self._capacity = capacity
        self._kept: OrderedDict[bytes, Stream] = OrderedDict()

    def of(self, batch: LocalBatch) -> Stream:
        """The stream of a batch of one group."""
        key = _digest(batch)
        if key not in self._kept:
            self._kept[key] = Stream.of(batch, self._rules)
            if len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self) -> None:
        """Begin anew, as if no stream had been seen."""
        self._kept.clear()


def _digest(batch: LocalBatch) -> bytes:
    found = hashlib.blake2b(batch.cu_seqlens.numpy().tobytes(), digest_size=16)
    for pieces in batch.layout.pieces:
        found.update(len(pieces).to_bytes(8, "little"))
        found.update(pieces.tobytes())
    return found.digest()


class Lists:
    """Makes what the attention of coming micro-batches needs while the device is busy."""

    def __init__(self, config: Config, topology: Topology, device: torch.device) -> None:
        shape = ModelShape.from_config(config.model)
        degree = config.engine.tensor_parallel_degree
        dtype = _DTYPES.get(config.model.dtype, torch.float32)
        heads = Heads(
            shape.num_heads // degree, shape.num_kv_heads // degree, shape.head_dim, dtype
        )
        self._preparer = Preparer(device, heads)
        self._topology = topology
        self._current: tuple[Stream, ...] = ()

    def begin(
        self, groups: Sequence[Group | None], parts: Sequence[LocalBatch], streams: Sequence[Stream]
    ) -> None:
        """Begin with a coming micro-batch; its masks are those that its contexts will have.

        Streams that the micro-batch before has too are left out: its backward, which is going on,
        makes what is missing of them by itself.
        """
        begun = []
        for group, part, stream in zip(groups, parts, streams, strict=True):
            if stream in self._current:
                continue
            inner_size = None
            if group is not None:
                inner_size = self._topology.inner_size(group.ranks, group.strategy)
            begun.append(Part(stream.masks, stream.layout, part.cp_rank, part.strategy, inner_size))
        if begun:
            self._preparer.begin(begun)

    def take(self, streams: Sequence[Stream]) -> None:
        """Wait for what was begun, if anything was; these streams are now worked on."""
        self._preparer.take()
        self._current = tuple(streams)


def local_context(
    batch: LocalBatch,
    comm: CommGroup,
    rules: LayerRules | None = None,
    *,
    stream: Stream | None = None,
    deterministic: bool = False,
    gradient_dtype: torch.dtype | None = None,
    ledger: Ledger | None = None,
) -> AttentionContext:
    """How the attention of a batch is carried out: causal inside each document, or as rules say.

    Args:
        batch: of one group.
        comm: the group.
        rules: what layers see.
        stream: its layout and masks, where they are there already.
        deterministic: bitwise the same result every time.
        gradient_dtype: in what gradients of keys and values travel.
        ledger: counts what is sent.
    """
    stream = stream or Stream.of(batch, rules)
    whole = AttentionContext(
        mask=stream.whole,
        layout=stream.layout,
        group=comm,
        strategy=batch.strategy,
        deterministic=deterministic,
        num_padding=batch.num_padding,
        gradient_dtype=gradient_dtype,
        ledger=ledger,
    )
    if not stream.by_layer:
        return whole
    by_mask = {id(m): replace(whole, mask=m) for m in stream.masks}
    return replace(whole, layers=tuple(by_mask[id(m)] for m in stream.by_layer))


def joined_context(batch: LocalBatch, parts: list[AttentionContext]) -> AttentionContext:
    """The context of a rank that works in several groups, from theirs."""
    whole = replace(parts[0], layers=(), parts=tuple(parts), num_padding=batch.num_padding)
    if not parts[0].layers:
        return whole
    layers = zip(*(p.layers for p in parts), strict=True)
    return replace(whole, layers=tuple(replace(whole, parts=of_layer) for of_layer in layers))
