"""The part of the configuration that says what each layer's attention sees inside a document."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dist_attn.config_section import NonNegative, Positive, Section

#: The keys that each kind of mask takes; the first ones must be given.
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "causal": ((), ()),
    "window": (("window_tokens",), ("sink_tokens",)),
    "s2": (("block_tokens", "local_blocks", "stride_blocks"), ("dense_heads",)),
    "streaming_heads": (("window_tokens", "dense_heads"), ("sink_tokens",)),
    "window_per_head": (("head_windows",), ("sink_tokens",)),
}


class LayerMaskConfig(Section):
    """What the queries of some layers see, always inside their own document and causally.

    Distances, blocks and sinks count from the document's first token, wherever it is packed.
    """

    #: A Python slice of layer numbers (`:` all, `::3` every third, `-1:` the last), or a list.
    layers: str | list[int] = ":"
    #: causal: everything before. window: the last `window_tokens`, and the first `sink_tokens`.
    #: s2: local blocks and every `stride_blocks`-th block before, shifted from one group of heads
    #: (that share keys and values) to the next. streaming_heads: a window, but for `dense_heads`.
    #: window_per_head: a window for each head.
    kind: Literal["causal", "window", "s2", "streaming_heads", "window_per_head"]
    window_tokens: Positive | None = None
    sink_tokens: NonNegative = 0
    block_tokens: Positive | None = None
    local_blocks: Positive | None = None
    stride_blocks: Positive | None = None
    #: Query heads that see everything before them.
    dense_heads: list[NonNegative] | None = None
    #: A window in tokens for each query head.
    head_windows: list[Positive] | None = None

    @model_validator(mode="after")
    def _complete(self) -> LayerMaskConfig:
        needed, optional = _NEEDS[self.kind]
        missing = [key for key in needed if getattr(self, key) is None]
        fields = type(self).model_fields.items()
        given = {key for key, field in fields if getattr(self, key) != field.default}
        foreign = sorted(given - {"layers", "kind", *needed, *optional})
        if missing or foreign:
            what = f"lacks {', '.join(missing)}" if missing else f"takes no {', '.join(foreign)}"
            raise ValueError(f"kind '{self.kind}' {what}; its keys are {[*needed, *optional]}")
        if isinstance(self.layers, str) and self._slice() is None:
            raise ValueError(f"layers: a slice such as '::3' or a list, got '{self.layers}'")
        return self

    def layer_numbers(self, num_layers: int) -> list[int]:
        """The layers meant, of a model of `num_layers`.

        Raises:
            ValueError: a layer that the model does not have.
        """
        if isinstance(self.layers, list):
            wrong = [n for n in self.layers if not -num_layers <= n < num_layers]
            if wrong:
                raise ValueError(f"layers {wrong} of a model of {num_layers} layers")
            return sorted({n % num_layers for n in self.layers})
        found = self._slice()
        assert found is not None
        return list(range(num_layers))[found]

    @property
    def differs_by_head(self) -> bool:
        """Whether some heads see what others do not."""
        return self.kind not in ("causal", "window")

    def check_heads(self, num_heads: int) -> None:
        """Raise ValueError when the heads named are not the model's."""
        wrong = [h for h in self.dense_heads or [] if h >= num_heads]
        if wrong:
            raise ValueError(f"dense_heads {wrong} of a model of {num_heads} heads")
        if self.head_windows is not None and len(self.head_windows) != num_heads:
            raise ValueError(
                f"head_windows needs one window for each of {num_heads} heads, got "
                f"{len(self.head_windows)}"
            )

    def _slice(self) -> slice | None:
        parts = str(self.layers).split(":")
        try:
            numbers = [int(p) if p.strip() else None for p in parts]
        except ValueError:
            return None
        return slice(*numbers) if 2 <= len(numbers) <= 3 and numbers[-1] != 0 else None
