"""Rotary angles that stay right at any position, under any scaling, and in any dtype of the model.

Frequencies are worked out in float64 from the parameters, not read from a model's float32 buffer,
whose rounding alone turns position 1,000,000 by hundredths of a radian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_attn.errors import ConfigError

#: Scalings of transformers that are known here.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, eq=False)
class Frequencies:
    """What positions are multiplied with.

    Attributes:
        inv_freq: float64 [D / 2].
        attention_scaling: factor of sine and cosine.
        long_inv_freq: those of documents of more than `original_tokens` (longrope).
        growth_factor: documents of n > `original_tokens` are rotated by a base that is
            (growth_factor * n / original_tokens - growth_factor + 1) ^ (D / (D - 2)) times larger
            (dynamic).
        original_tokens: see above; 0 where a document's length plays no part.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0
    long_inv_freq: Tensor | None = None
    growth_factor: float | None = None
    original_tokens: int = 0

    @property
    def by_document(self) -> bool:
        """Whether a document's length plays a part."""
        return self.original_tokens > 0

    def to(self, device: torch.device) -> Frequencies:
        """The same on a device."""
        if self.inv_freq.device == device:
            return self
        long = None if self.long_inv_freq is None else self.long_inv_freq.to(device)
        return Frequencies(
            self.inv_freq.to(device), self.attention_scaling, long, self.growth_factor,
            self.original_tokens,
        )  # fmt: skip

    def of_documents(self, document_tokens: Tensor | None) -> Tensor:
        """Frequencies of tokens, float64: [D / 2] for all, or [..., D / 2] by their documents.

        Args:
            document_tokens: length of each token's document [...].
        """
        if not self.by_document:
            return self.inv_freq
        if document_tokens is None:
            raise ValueError(
                "this rotary scaling depends on the length of each token's document; pass "
                "document_tokens in the model call"
            )
        n = document_tokens[..., None]
        if self.long_inv_freq is not None:
            return torch.where(n > self.original_tokens, self.long_inv_freq, self.inv_freq)
        assert self.growth_factor is not None
        ratio = n.double() / self.original_tokens
        growth = (self.growth_factor * ratio - (self.growth_factor - 1)).clamp_min(1.0)
        pairs = len(self.inv_freq)
        power = torch.arange(pairs, dtype=torch.float64, device=n.device) / (pairs - 1)
        return self.inv_freq * growth**-power


def frequencies(parameters: Mapping[str, Any], head_dim: int) -> Frequencies:
    """Frequencies of a transformers configuration's `rope_parameters`.

    Args:
        parameters: `rope_type`, `rope_theta` and what the type needs.
        head_dim: D.

    Raises:
        ConfigError: a type or a value that is not supported.

    Numerics: float64.

    Source: the formulas of transformers' `modeling_rope_utils`; unlike there, "dynamic" and
        "longrope" go by the length of each document instead of the longest of a batch.
    """
    p = dict(parameters)
    rope_type = p.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rotary scaling '{rope_type}' is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if p.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor {p['partial_rotary_factor']} is not supported; all of a head "
            f"is rotated"
        )
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    inv_freq = float(p["rope_theta"]) ** -exponents
    original = int(p.get("original_max_position_embeddings") or 0)
    match rope_type:
        case "linear":
            return Frequencies(inv_freq / p["factor"])
        case "dynamic":
            return Frequencies(inv_freq, growth_factor=float(p["factor"]), original_tokens=original)
        case "yarn":
            return Frequencies(_yarn(inv_freq, p, head_dim), _yarn_attention(p))
        case "llama3":
            return Frequencies(_llama3(inv_freq, p))
        case "longrope":
            short, long = (_factors(p, k, len(inv_freq)) for k in ("short_factor", "long_factor"))
            return Frequencies(inv_freq / short, _longrope_attention(p), inv_freq / long,
                               original_tokens=original)  # fmt: skip
        case _:
            return Frequencies(inv_freq)


def _yarn(inv_freq: Tensor, p: Mapping[str, Any], head_dim: int) -> Tensor:
    """Fast pairs of dimensions stay, slow ones are slowed down, with a ramp in between."""

    def pair_of(rotations: float) -> float:
        """The pair that turns so often over the original length."""
        wavelength = p["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(p["rope_theta"]))

    first, last = pair_of(p.get("beta_fast") or 32), pair_of(p.get("beta_slow") or 1)
    if p.get("truncate") is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(len(inv_freq), dtype=torch.float64)
    slowed = ((pairs - first) / (last - first)).clamp(0, 1)
    return inv_freq / p["factor"] * slowed + inv_freq * (1 - slowed)


def _yarn_attention(p: Mapping[str, Any]) -> float:
    def scale(weight: float) -> float:
        return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def _llama3(inv_freq: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Pairs of long wavelength are slowed down, of short ones not, with a ramp in between."""
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / p["factor"] * (1 - kept) + inv_freq * kept


def _longrope_attention(p: Mapping[str, Any]) -> float:
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p["factor"] <= 1:
        return 1.0
    return math.sqrt(1 + math.log(p["factor"]) / math.log(p["original_max_position_embeddings"]))


def _factors(p: Mapping[str, Any], key: str, pairs: int) -> Tensor:
    factors = torch.tensor(p[key], dtype=torch.float64)
    if len(factors) != pairs:
        raise ConfigError(
            f"{key} needs {pairs} factors, half the head dimension, got {len(factors)}"
        )
    return factors


def rotary_angles(position_ids: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles of positions, float32 [..., D / 2], less whole turns.

    Args:
        position_ids: positions [...].
        inv_freq: float64 [D / 2] or [..., D / 2].

    Numerics: the product in float64; good to 4e-7 at any position.
    """
    turns = position_ids[..., None].double() * inv_freq
    return torch.remainder(turns, 2 * math.pi).float()


class ExactRotary(nn.Module):
    """Takes the place of a transformers model's rotary embedding.

    The frequencies are no buffer: casting the model to bf16, as DeepSpeed does, would take them
    along and turn position 4,096 by most of a radian.
    """

    def __init__(self, found: Frequencies) -> None:
        super().__init__()
        self.frequencies = found
        #: Lengths of the documents of the coming call's tokens [B, L], where these play a part.
        self.document_tokens: Tensor | None = None
        #: Give float32 whatever the dtype of the model, for kernels that rotate in float32.
        self.keep_float32 = False

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, L, D] of positions [B, L], in the dtype of `x` or float32."""
        self.frequencies = self.frequencies.to(position_ids.device)
        inv_freq = self.frequencies.of_documents(self.document_tokens)
        angles = rotary_angles(position_ids, inv_freq)
        both = torch.cat((angles, angles), dim=-1)
        scaling = self.frequencies.attention_scaling
        dtype = torch.float32 if self.keep_float32 else x.dtype
        return (both.cos() * scaling).to(dtype), (both.sin() * scaling).to(dtype)
