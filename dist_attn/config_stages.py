"""The part of the configuration that lets documents grow longer in the course of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dist_attn.config_data import BatchConfig
from dist_attn.config_rope import RopeConfig
from dist_attn.config_section import Positive, Section


class StageConfig(Section):
    """A part of a run with its own length of documents and its own rotary scaling.

    Weights, optimizer state, learning rate schedule and random state go on from one stage to the
    next; what this does not name is as in the rest of the configuration.
    """

    #: Takes the place of data.max_document_tokens.
    max_document_tokens: Positive
    #: When the stage ends: after so many steps, or the step in which it passes so many tokens. The
    #: last stage has neither and goes on to run.steps.
    steps: Positive | None = None
    tokens: Positive | None = None
    #: Takes the place of model.rope.
    rope: RopeConfig | None = None
    #: Takes the place of data.batch.
    batch: BatchConfig | None = None
    #: Takes the place of data.overlong.
    overlong: Literal["refuse", "split", "drop"] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> StageConfig:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("give one of `steps` and `tokens`, not both")
        return self

    @property
    def is_open(self) -> bool:
        """Whether it goes on to the end of the run."""
        return self.steps is None and self.tokens is None


def check_ends(stages: list[StageConfig]) -> None:
    """Raise ValueError unless the last stage, and no other, is open."""
    wrong = [i for i, s in enumerate(stages[:-1]) if s.is_open]
    if wrong:
        raise ValueError(
            f"stages.{wrong[0]} has no end; give it `steps` or `tokens` (only the last stage goes "
            f"on to run.steps)"
        )
    if stages and not stages[-1].is_open:
        raise ValueError(
            "the last of `stages` ends with run.steps; leave its `steps` and `tokens` out"
        )
