"""A picture of what the layers see: one panel per rule, heads that differ in different shades."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from dist_attn.config_masks import LayerMaskConfig
from dist_attn.masks.layers import LayerRules

#: Tokens of the document that is drawn, at the most: every pair is looked at.
MAX_TOKENS = 2048


def mask_figure(rules: LayerRules, max_tokens: int = MAX_TOKENS) -> Figure:
    """Draw each rule over one document, dark where all heads see, light where some do."""
    count = len(rules.rules)
    figure = Figure(figsize=(4.2 * count, 4.6), layout="constrained")
    for index, rule in enumerate(rules.rules):
        tokens = min(_telling_length(rule), max_tokens)
        mask = rules.mask(index, [0, tokens])
        patterns = [mask.pattern(h) for h in range(rules.num_heads)]
        seen = np.zeros((tokens, tokens))
        for pattern in dict.fromkeys(patterns):
            head = patterns.index(pattern)
            seen += mask.materialize(tokens, head) * (patterns.count(pattern) / len(patterns))
        axes = figure.add_subplot(1, count, index + 1)
        axes.imshow(seen, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        layers = [n for n, r in enumerate(rules.of_layer) if r == index]
        axes.set_title(f"{rule.kind}: layers {_runs(layers)}", fontsize=10, loc="left")
        axes.set_xlabel("key (token of the document)")
        axes.set_ylabel("query")
    return figure


def _telling_length(rule: LayerMaskConfig) -> int:
    """Tokens in which the pattern repeats a few times."""
    block = (rule.block_tokens or 1) * (rule.stride_blocks or 1)
    windows = [rule.window_tokens or 0, *(rule.head_windows or [])]
    local = (rule.block_tokens or 0) * (rule.local_blocks or 0)
    return max(128, 3 * block, 3 * max(windows), 3 * local)


def _runs(numbers: list[int]) -> str:
    """Numbers in short: 0-3, 5, 7-9."""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
