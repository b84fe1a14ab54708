"""Rotary angles that stay right at any position and in any dtype of the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_attn.errors import ConfigError

#: Scalings whose frequencies do not depend on the sequence at hand.
STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotary_angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles of positions, float32 [..., D / 2], less whole turns.

    Numerics: the product in float64; good to 4e-7 at any position.
    """
    turns = position_ids[..., None].double() * inv_freq
    return torch.remainder(turns, 2 * math.pi).float()


class ExactRotary(nn.Module):
    """Takes the place of a transformers model's rotary embedding.

    The frequencies are no buffer: casting the model to bf16, as DeepSpeed does, would take them
    along and turn position 4,096 by most of a radian.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        rope_type = str(getattr(stock, "rope_type", "default"))
        if rope_type not in STATIC_ROPE_TYPES:
            raise ConfigError(
                f"model.checkpoint: its rotary scaling '{rope_type}' depends on the sequence at "
                f"hand; supported are {', '.join(STATIC_ROPE_TYPES)}"
            )
        inv_freq, scaling = stock.inv_freq, stock.attention_scaling
        assert isinstance(inv_freq, Tensor)
        assert inv_freq.dtype == torch.float32, "frequencies were cast before they were read"
        self.inv_freq = inv_freq.detach().double()
        self.attention_scaling = float(scaling)  # type: ignore[arg-type]
        #: Give float32 whatever the dtype of the model, for kernels that rotate in float32.
        self.keep_float32 = False

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, L, D] of positions [B, L], in the dtype of `x` or float32."""
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = rotary_angles(position_ids, self.inv_freq)
        both = torch.cat((angles, angles), dim=-1)
        scaling = self.attention_scaling
        dtype = torch.float32 if self.keep_float32 else x.dtype
        return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)
