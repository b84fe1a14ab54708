"""Rotary scalings: angles against float64, and against transformers document by document."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_attn.attention.context import AttentionContext
from dist_attn.config import ModelConfig, RopeConfig
from dist_attn.errors import ConfigError
from dist_attn.groups import single_rank_group
from dist_attn.integrations.hf import build_model, save_for_transformers
from dist_attn.integrations.megatron import ExplicitRotary
from dist_attn.integrations.rotary import frequencies
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents

D = 16
THETA = 5e4
FACTORS = {"short_factor": [1 + 0.1 * i for i in range(D // 2)],
           "long_factor": [2 + 1.5 * i for i in range(D // 2)]}  # fmt: skip
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 64},
    "yarn, all keys": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
        "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "llama3": {
        "factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {"factor": 32.0, "original_max_position_embeddings": 32, **FACTORS},
}  # fmt: skip
MILLION = 1_000_000


def rope(name: str, **more: Any) -> RopeConfig:
    return RopeConfig(
        **{
            "rope_type": name.split(",", maxsplit=1)[0],
            "rope_theta": THETA,
            **SCALINGS[name],
            **more,
        }
    )


def by_hand(name: str, n: int) -> list[float]:
    """Frequencies in Python's double precision, pair by pair, of a document of n tokens."""
    p, found = SCALINGS[name], []
    original = p.get("original_max_position_embeddings", 1)
    for i in range(D // 2):
        w = 1.0 / THETA ** (2 * i / D)
        match name.split(",", maxsplit=1)[0]:
            case "linear":
                w /= p["factor"]
            case "dynamic":
                grown = max(n, original) / original * p["factor"] - (p["factor"] - 1)
                w = 1.0 / (THETA * grown ** (D / (D - 2))) ** (2 * i / D)
            case "yarn":
                pairs = [
                    D * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(THETA))
                    for turns in (p.get("beta_fast", 32), p.get("beta_slow", 1))
                ]
                if p.get("truncate", True):
                    pairs = [math.floor(pairs[0]), math.ceil(pairs[1])]
                low, high = max(pairs[0], 0), min(pairs[1], D - 1)
                ramp = min(max((i - low) / (high - low), 0.0), 1.0)
                w = w * (1 - ramp) + w / p["factor"] * ramp
            case "llama3":
                wavelength = 2 * math.pi / w
                if wavelength > original / p["low_freq_factor"]:
                    w /= p["factor"]
                elif wavelength >= original / p["high_freq_factor"]:
                    share = (original / wavelength - 1.0) / (4.0 - 1.0)
                    w = (1 - share) * w / p["factor"] + share * w
            case "longrope":
                w /= p["long_factor" if n > original else "short_factor"][i]
        found.append(w)
    return found


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_are_right_at_position_one_million(name: str) -> None:
    config = ModelConfig(dtype="bf16", hidden_size=4 * D, rope=rope(name))
    # What DeepSpeed does to a bf16 model: parameters and buffers.
    model = build_model(config, 53, seed=0).bfloat16()
    positions = torch.tensor([[0, 1, 4095, 131_071, MILLION - 1, MILLION, 5]])
    lengths = torch.tensor([[2 * MILLION] * 6 + [9]])
    model.model.rotary_emb.document_tokens = lengths
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    scaling = model.model.rotary_emb.frequencies.attention_scaling
    angles = torch.tensor(
        [
            [math.fmod(p * w, 2 * math.pi) for w in by_hand(name, n)]
            for p, n in zip(positions[0].tolist(), lengths[0].tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    rounding = 3e-6
    assert (cos[0, :, : D // 2].double() - angles.cos() * scaling).abs().max() < rounding
    assert (sin[0, :, D // 2 :].double() - angles.sin() * scaling).abs().max() < rounding
    # Megatron's angles are those without the factor.
    other = ExplicitRotary(model.model.rotary_emb.frequencies)((positions, lengths))
    assert (other[:, 0, 0, : D // 2].double().cos() - angles.cos()).abs().max() < rounding
    # Controls: float32 frequencies at a million, bf16 ones long before.
    single = torch.tensor(by_hand(name, 2 * MILLION), dtype=torch.float64)
    at = positions[0, :, None].double()
    assert ((at * single.float().double()).cos() - angles.cos())[5].abs().max() > 10 * rounding
    assert ((at * single.bfloat16().double()).cos() - angles.cos())[2:6].abs().max() > 0.3


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "default"])
@pytest.mark.parametrize("n", [20, 300])
def test_frequencies_are_those_of_transformers(name: str, n: int) -> None:
    config = rope(name)
    parameters = config.parameters()
    hf = LlamaConfig(hidden_size=4 * D, num_attention_heads=4, max_position_embeddings=32)
    hf.rope_parameters = dict(parameters)
    theirs, attention = ROPE_INIT_FUNCTIONS[config.rope_type](hf, device="cpu", seq_len=n)
    ours = frequencies(parameters, D)
    mine = ours.of_documents(torch.tensor([n])).reshape(-1)
    torch.testing.assert_close(mine.float(), theirs, rtol=3e-6, atol=0)
    assert ours.attention_scaling == pytest.approx(attention, rel=1e-12)
    plain = frequencies({"rope_theta": THETA}, D).inv_freq
    differs = not torch.allclose(mine, plain)
    assert differs == (name != "dynamic" or n > 32)


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_packed_documents_are_turned_by_their_own_lengths(tmp_path: Path, name: str) -> None:
    """As transformers does with each document alone; and export writes what it needs to do so."""
    lengths = (60, 20, 45)
    config = ModelConfig(
        dtype="fp32", rope=rope(name), hidden_size=4 * D, vocab_size=53, rope_theta=THETA
    )
    model = build_model(config, 53, seed=4)
    with torch.no_grad():  # sharp enough attention to tell angles apart
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    save_for_transformers(config, parameters, tmp_path, max_positions=1024)
    cu = np.concatenate([[0], np.cumsum(lengths)])
    context = AttentionContext(
        Documents(cu) & Causal(), make_layout("contiguous", cu, 1), single_rank_group(0), "local"
    )
    ids = torch.randint(0, 53, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1)
    labels[0, cu[1:] - 1] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    of_token = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))[None]
    ours = [
        model(ids, labels, positions, context, torch.where(of_token == 20, n, of_token)).item()
        for n in (20, 60)
    ]
    total = 0.0
    for a, b in itertools.pairwise(cu):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)  # it remembers what it has seen
        logits = stock(input_ids=ids[:, a:b], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels[0, a:b], reduction="sum").item()
    assert ours[0] == pytest.approx(total, rel=1e-5)
    # The control: by the longest document of the batch.
    assert abs(ours[1] - total) > 1e-4 * total
    with pytest.raises(ValueError, match="pass document_tokens"):
        model(ids, labels, positions, context)


def test_a_longrope_checkpoint_without_a_factor(tmp_path: Path) -> None:
    """Its factor is the ratio of two lengths of its configuration."""
    config = LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32,
        num_hidden_layers=1, vocab_size=53, max_position_embeddings=1024,
    )  # fmt: skip
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": THETA, **FACTORS,
                              "original_max_position_embeddings": 32}  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = build_model(ModelConfig(checkpoint=str(tmp_path), dtype="fp32"), 53, seed=0)
    found = model.model.rotary_emb.frequencies
    assert found.attention_scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(32)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rope_type": "linear"}, "'linear' lacks factor; its keys are"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "takes no beta_fast"),
        ({"rope_type": "yarn", "factor": 2.0}, "lacks original_max_position_embeddings"),
        ({**SCALINGS["llama3"], "rope_type": "llama3", "low_freq_factor": 4.0}, "less than high"),
    ],
)
def test_incomplete_scalings(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RopeConfig(**values)


def test_factors_that_do_not_fit_the_head() -> None:
    config = ModelConfig(rope=rope("longrope", long_factor=[1.0, 2.0]), hidden_size=4 * D)
    with pytest.raises(ConfigError, match=r"model\.rope: long_factor needs 8 factors"):
        build_model(config.model_copy(update={"dtype": "fp32"}), 53, seed=0)
    with pytest.raises(ConfigError, match="'proportional' is not supported"):
        frequencies({"rope_type": "proportional", "rope_theta": 1e4}, D)
