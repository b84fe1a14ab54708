"""The masks of a model's layers from the configuration, the same wherever a document is packed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dist_attn.config_masks import LayerMaskConfig
from dist_attn.errors import ConfigError
from dist_attn.layout import IntArray, check_cu_seqlens
from dist_attn.masks.base import BoolArray, Mask
from dist_attn.masks.parts import NO_END, Part
from dist_attn.masks.patterns import sliding_window
from dist_attn.masks.rules import Causal, DocumentPrefix, Documents, IntervalRule, PerHead

#: Lengths at which areas are counted, and their ratio.
_FIRST_LENGTH = 16
_LENGTH_RATIO = 1.15
#: Queries at most whose keys are counted to balance a stream.
_COUNTED_QUERIES = 1 << 13


@dataclass(frozen=True, eq=False)
class LocalBlocks(IntervalRule):
    """A query sees its own block and `num_blocks - 1` before it, from its document's start on."""

    cu_seqlens: IntArray
    block: int
    num_blocks: int

    def bounds(self, q: IntArray) -> tuple[IntArray, IntArray]:
        """See `IntervalRule`."""
        start = _start_of(self.cu_seqlens, q)
        q_block = (q - start) // self.block
        first = np.maximum(q_block - self.num_blocks + 1, 0)
        return start + first * self.block, start + (q_block + 1) * self.block


@dataclass(frozen=True, eq=False)
class DocumentStride(Mask):
    """Every query sees each `stride`-th block of each document, shifted between groups of heads.

    Head h sees the blocks b of a document, counted from its start, with
    b % stride == h // heads_per_shift % stride.
    """

    cu_seqlens: IntArray
    block: int
    stride: int
    heads_per_shift: int

    def pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return head // self.heads_per_shift % self.stride

    def interval_pattern(self, head: int) -> Hashable:
        """See `Mask`."""
        return 0

    def allows(self, q: IntArray, k: IntArray, head: int = 0) -> BoolArray:
        """See `Mask`."""
        block = (k - _start_of(self.cu_seqlens, k)) // self.block
        return (block % self.stride == self.pattern(head)) & (q >= 0)

    def touched(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return [Part(np.zeros(1, np.int64), np.full(1, NO_END), self._keys(head))]

    def full(self, first: IntArray, last: IntArray, head: int = 0) -> list[Part]:
        """See `Mask`."""
        return self.touched(first, last, head)

    def _keys(self, head: int) -> IntArray:
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        step = self.block * self.stride
        origin = starts + self.block * int(self.pattern(head))  # type: ignore[call-overload]
        counts = np.maximum(-(-(ends - origin) // step), 0)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        lo = np.repeat(origin, counts) + number * step
        return np.stack([lo, np.minimum(lo + self.block, np.repeat(ends, counts))], axis=1)


@dataclass(frozen=True)
class LayerRules:
    """The rules of a model's layers.

    Attributes:
        rules: the rules that occur.
        of_layer: for each layer, the index of its rule among them.
    """

    rules: tuple[LayerMaskConfig, ...]
    of_layer: tuple[int, ...]
    num_heads: int
    num_kv_heads: int

    @property
    def distinct(self) -> range:
        """The numbers of the rules."""
        return range(len(self.rules))

    def first(self, num_layers: int) -> LayerRules:
        """Those of a model with fewer layers."""
        return replace(self, of_layer=self.of_layer[:num_layers])

    def mask(self, rule: int, cu_seqlens: Sequence[int] | IntArray) -> Mask:
        """The mask of a rule over packed documents."""
        return document_mask(self.rules[rule], cu_seqlens, self.num_heads, self.num_kv_heads)

    def row_areas(self, cu_seqlens: Sequence[int] | IntArray, positions: IntArray) -> IntArray:
        """Count the keys that each of some queries sees in all layers and heads together."""
        seq_len = int(cu_seqlens[-1])
        total = np.zeros(len(positions), dtype=np.int64)
        for rule in self.distinct:
            mask = self.mask(rule, cu_seqlens)
            heads: dict[Hashable, list[int]] = {}
            for head in range(self.num_heads):
                heads.setdefault(mask.pattern(head), []).append(head)
            for alike in heads.values():
                times = self.of_layer.count(rule) * len(alike)
                total += times * mask.row_areas(positions, seq_len, alike[0])
        return total

    def chunk_areas(self, cu_seqlens: Sequence[int] | IntArray) -> Callable[[IntArray], IntArray]:
        """What `make_layout` balances: `row_areas`, of long streams each so manieth."""

        def areas(positions: IntArray) -> IntArray:
            step = 1 + len(positions) // _COUNTED_QUERIES
            counted = self.row_areas(cu_seqlens, positions[::step])
            return np.repeat(counted, step)[: len(positions)]

        return areas


def layer_rules(
    configs: Sequence[LayerMaskConfig], num_layers: int, num_heads: int, num_kv_heads: int
) -> LayerRules | None:
    """The rule of each layer; None where all layers are causal.

    Later entries win, and layers that none names are causal.

    Raises:
        ConfigError: an entry names layers or heads that the model does not have.
    """
    rules = [LayerMaskConfig(kind="causal"), *configs]
    of_layer = [0] * num_layers
    for index, config in enumerate(configs):
        try:
            config.check_heads(num_heads)
            numbers = config.layer_numbers(num_layers)
        except ValueError as error:
            raise ConfigError(f"attention.masks.{index}: {error}") from None
        for number in numbers:
            of_layer[number] = index + 1
    used = sorted(set(of_layer))
    if all(rules[i].kind == "causal" for i in used):
        return None
    return LayerRules(
        rules=tuple(rules[i] for i in used),
        of_layer=tuple(used.index(i) for i in of_layer),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )


def document_mask(
    rule: LayerMaskConfig, cu_seqlens: Sequence[int] | IntArray, num_heads: int, num_kv_heads: int
) -> Mask:
    """The mask of one rule over packed documents.

    Args:
        rule: what a query sees inside its document.
        cu_seqlens: boundaries of the documents in the stream.
        num_heads: query heads of the model.
        num_kv_heads: key/value heads; an s2 pattern shifts from one's queries to the next's.
    """
    cu = check_cu_seqlens(cu_seqlens)
    causal = Documents(cu) & Causal()
    if rule.kind == "causal":
        return causal
    if rule.kind == "window":
        return causal & _window(cu, rule.window_tokens, rule.sink_tokens)
    if rule.kind == "window_per_head":
        windows = rule.head_windows or []
        # Heads of one window share their mask, and so their lists.
        by_window = {w: _window(cu, w, rule.sink_tokens) for w in windows}
        return causal & PerHead(tuple(by_window[w] for w in windows))
    if rule.kind == "s2":
        sparse = causal & _s2(rule, cu, num_heads // num_kv_heads)
    else:
        sparse = causal & _window(cu, rule.window_tokens, rule.sink_tokens)
    dense_heads = rule.dense_heads or []
    if not dense_heads:
        return sparse
    return PerHead(tuple(causal if h in dense_heads else sparse for h in range(num_heads)))


def mean_area(rules: LayerRules | None, longest: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Allowed pairs of a document, the mean of layers and heads, at lengths up to `longest`.

    Returns:
        Lengths, growing by about a sixth, and the area at each: counted, not derived, so that every
        rule costs what its mask lets through. Both empty where all layers are causal.
    """
    if rules is None:
        return (), ()
    lengths = [_FIRST_LENGTH]
    while lengths[-1] < longest:
        lengths.append(min(int(lengths[-1] * _LENGTH_RATIO) + 1, longest))
    shares = [rules.of_layer.count(r) / len(rules.of_layer) for r in rules.distinct]
    areas = []
    for n in lengths:
        by_rule = [rules.mask(r, [0, n]).total_area(n, rules.num_heads) for r in rules.distinct]
        total = sum(s * a for s, a in zip(shares, by_rule, strict=True))
        areas.append(total / rules.num_heads)
    return tuple(lengths), tuple(areas)


def _window(cu: IntArray, tokens: int | None, sinks: int) -> Mask:
    assert tokens is not None, "the configuration requires a window"
    window = sliding_window(tokens)
    if not sinks:
        return window
    lengths = np.diff(cu)
    return window | DocumentPrefix(cu, np.minimum(lengths, sinks))


def _s2(rule: LayerMaskConfig, cu: IntArray, heads_per_shift: int) -> Mask:
    assert rule.block_tokens is not None, "the configuration requires blocks"
    assert rule.local_blocks is not None, "the configuration requires local blocks"
    assert rule.stride_blocks is not None, "the configuration requires a stride"
    local = LocalBlocks(cu, rule.block_tokens, rule.local_blocks)
    return local | DocumentStride(cu, rule.block_tokens, rule.stride_blocks, heads_per_shift)


def _start_of(cu: IntArray, positions: IntArray) -> IntArray:
    last = max(len(cu) - 2, 0)
    return cu[np.clip(np.searchsorted(cu, positions, side="right") - 1, 0, last)]
