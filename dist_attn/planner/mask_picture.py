"""A picture of what the layers see: one panel per rule, heads that differ in different shades."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from dist_attn.config_masks import LayerMaskConfig
from dist_attn.masks.layers import LayerRules

#: Queries and keys that are looked at, evenly over the document that is drawn.
_SAMPLES = 1024


def mask_figure(rules: LayerRules) -> Figure:
    """Draw each rule over one document, dark where all heads see, light where some do."""
    count = len(rules.rules)
    figure = Figure(figsize=(4.4 * count, 4.8), layout="constrained")
    for index, rule in enumerate(rules.rules):
        tokens = _telling_length(rule)
        positions = np.linspace(0, tokens - 1, min(tokens, _SAMPLES)).astype(np.int64)
        mask = rules.mask(index, [0, tokens])
        patterns = [mask.pattern(h) for h in range(rules.num_heads)]
        seen = np.zeros((len(positions), len(positions)))
        for pattern in dict.fromkeys(patterns):
            head = patterns.index(pattern)
            allowed = mask.allows(positions[:, None], positions[None, :], head)
            seen += allowed * (patterns.count(pattern) / len(patterns))
        axes = figure.add_subplot(1, count, index + 1)
        axes.imshow(seen, cmap="Blues", vmin=0, vmax=1, extent=(0, tokens, tokens, 0))
        layers = [n for n, r in enumerate(rules.of_layer) if r == index]
        title = f"{rule.kind}: {len(layers)} of {len(rules.of_layer)} layers"
        axes.set_title(f"{title}\n{_short(_runs(layers))}", fontsize=10, loc="left")
        axes.set_xlabel("key (token of the document)")
        axes.set_ylabel("query")
    return figure


def _telling_length(rule: LayerMaskConfig) -> int:
    """Tokens in which the pattern repeats a few times."""
    block = rule.block_tokens or 1
    windows = [rule.window_tokens or 0, *(rule.head_windows or [])]
    spans = [block * (rule.stride_blocks or 1), block * (rule.local_blocks or 1), *windows]
    return max(64, 6 * max(spans))


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(",", 1)[0] + ", ..."


def _runs(numbers: list[int]) -> str:
    """Numbers in short: 0-3, 5, 7-9."""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
