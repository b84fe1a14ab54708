"""What follows a loss or a gradient that is NaN or infinite: stop, or leave the step out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Literal

from dist_attn.errors import NonFiniteError

logger = logging.getLogger(__name__)

#: A run that has nothing but such steps is broken.
MAX_SKIPPED_IN_A_ROW = 10
_NAMES_SHOWN = 5


class NonFinitePolicy:
    """Judges steps after the engine, which leaves weights alone when gradients are not finite.

    All ranks hold the same loss and norm, so that they come to the same verdict.
    """

    def __init__(
        self, mode: Literal["stop", "skip"], name: Callable[[int], str], *, speaks: bool
    ) -> None:
        self._mode = mode
        self._speaks = speaks
        self._name = name
        self._in_a_row = 0

    def skipped(self, step: int, loss: float, norm: float, suspects: Iterable[int]) -> bool:
        """Whether the step changed nothing.

        Args:
            step: the step.
            loss: its mean loss.
            norm: of its gradient, before clipping.
            suspects: documents of the groups whose own loss is not finite, or at whose tokens the
                gradient is not.

        Raises:
            NonFiniteError: when the run is to stop at such a step, or had too many in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        text = f"step {step}: the loss is {loss}, the gradient's norm {norm}; {self._who(suspects)}"
        if self._mode == "stop":
            raise NonFiniteError(
                f"{text}. The weights are those of before this step, as in the newest checkpoint; "
                f"look at these documents, lower optimizer.lr, or set run.nonfinite to 'skip'"
            )
        if self._in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{text}. These are {self._in_a_row} such steps in a row; resume from a checkpoint "
                f"with a lower optimizer.lr"
            )
        if self._speaks:
            logger.warning("%s. The step is left out", text)
        return True

    def _who(self, suspects: Iterable[int]) -> str:
        documents = sorted(set(suspects))
        if not documents:
            return (
                "every document's loss is finite, and so is the gradient at every token: it comes "
                "up where gradients are added"
            )
        names = ", ".join(self._name(d) for d in documents[:_NAMES_SHOWN])
        more = len(documents) - _NAMES_SHOWN
        return f"it comes from {names}" + (
            f" or {more} more of the same groups" if more > 0 else ""
        )
