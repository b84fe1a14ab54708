"""The part of the configuration that says how positions turn queries and keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dist_attn.config_section import Positive, PositiveFloat, Section

Factor = Annotated[float, Field(ge=1)]

#: The keys that each kind of scaling needs and those that it also takes.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        (),
    ),
    "longrope": (
        ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
        ("attention_factor",),
    ),
}


class RopeConfig(Section):
    """Rotary base and scaling, by the names and formulas of transformers' `rope_parameters`.

    `dynamic` (NTK) and `longrope` depend on a sequence's length: here on that of each document,
    whatever else is packed beside it.
    """

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    #: By default that of the model.
    rope_theta: PositiveFloat | None = None
    factor: Factor | None = None
    #: Tokens of the documents that the model was made for before it was scaled.
    original_max_position_embeddings: Positive | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    mscale: PositiveFloat | None = None
    mscale_all_dim: PositiveFloat | None = None
    truncate: bool | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    #: One factor for each pair of a head's dimensions.
    short_factor: list[PositiveFloat] | None = None
    long_factor: list[PositiveFloat] | None = None

    @model_validator(mode="after")
    def _complete(self) -> RopeConfig:
        needed, optional = _KEYS[self.rope_type]
        given = set(self.parameters()) - {"rope_type", "rope_theta"}
        missing = [key for key in needed if key not in given]
        foreign = sorted(given - {*needed, *optional})
        if missing or foreign:
            what = f"lacks {', '.join(missing)}" if missing else f"takes no {', '.join(foreign)}"
            keys = ["rope_theta", *needed, *optional]
            raise ValueError(f"rope_type '{self.rope_type}' {what}; its keys are {keys}")
        if self.rope_type == "llama3":
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"low_freq_factor must be less than high_freq_factor, got "
                    f"{self.low_freq_factor:g} and {self.high_freq_factor:g}"
                )
        return self

    def parameters(self) -> dict[str, Any]:
        """What is given, as transformers' `rope_parameters`."""
        return self.model_dump(exclude_none=True)
