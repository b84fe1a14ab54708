"""The transformers side: our attention in a stock model, local checkpoints, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dist_attn.attention.context import AttentionContext
from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError, PlanError
from dist_attn.groups import single_rank_group
from dist_attn.integrations.hf import ATTENTION_NAME, build_model, register_attention
from dist_attn.layout import make_layout
from dist_attn.masks import Causal, Documents

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LENGTHS = (17, 1, 30)


def context_of(lengths: tuple[int, ...]) -> AttentionContext:
    cu = np.concatenate([[0], np.cumsum(lengths)])
    layout = make_layout("contiguous", cu, 1)
    return AttentionContext(Documents(cu) & Causal(), layout, single_rank_group(0), "local")


def packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES["vocab_size"], (1, sum(lengths)), generator=g)
    labels, positions = ids.roll(-1), torch.cat([torch.arange(n) for n in lengths])[None]
    labels[0, np.cumsum(lengths) - 1] = -100
    return ids, labels, positions


def save_checkpoint(folder: Path, config: LlamaConfig | Qwen3Config) -> torch.nn.Module:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("tied", [False, True])
def test_a_local_checkpoint_gives_transformers_own_loss(
    tmp_path: Path, kind: type, tied: bool
) -> None:
    extra = {"head_dim": 8} if kind is Qwen3Config else {}
    stock = save_checkpoint(tmp_path, kind(**SIZES, tie_word_embeddings=tied, **extra))
    ours = build_model(ModelConfig(checkpoint=str(tmp_path), dtype="fp32"), 53, seed=0)
    ids, labels, positions = packed(LENGTHS)
    total = ours(ids, labels, positions, context_of(LENGTHS))
    total.backward()

    expected = torch.zeros(())
    for document, label in zip(ids[0].split(LENGTHS), labels[0].split(LENGTHS), strict=True):
        logits = stock(input_ids=document[None], use_cache=False).logits[0]
        part = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        expected = expected + torch.nan_to_num(part)
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    gradients = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4)

    one_document = ours(ids, labels, positions, context_of((sum(LENGTHS),)))
    assert abs(one_document.item() - expected.item()) > 0.01


def test_gradient_checkpointing_changes_nothing() -> None:
    ids, labels, positions = packed(LENGTHS)
    gradients = []
    for checkpointing, keep in ((False, False), (True, False), (True, True)):
        config = ModelConfig(
            dtype="fp32", gradient_checkpointing=checkpointing, keep_attention=keep
        )
        model = build_model(config, 53, seed=1)
        model(ids, labels, positions, context_of(LENGTHS)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (build_model(ModelConfig(dtype="fp32"), 53, seed=s) for s in (1, 1, 2))
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gpt2"}, "is of type 'gpt2'; supported are llama"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding window of 16"),
        ({"vocab_size": 11}, "vocabulary of 11"),
    ],
)
def test_checkpoints_that_cannot_be_trained(tmp_path: Path, change: dict, says: str) -> None:
    save_checkpoint(tmp_path, LlamaConfig(**SIZES))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=says):
        build_model(ModelConfig(checkpoint=str(tmp_path), dtype="fp32"), 53, seed=0)


def test_damaged_and_missing_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build_model(ModelConfig(checkpoint=str(tmp_path), dtype="fp32"), 53, seed=0)
    save_checkpoint(tmp_path, LlamaConfig(**SIZES))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot load"):
        build_model(ModelConfig(checkpoint=str(tmp_path), dtype="fp32"), 53, seed=0)
    with pytest.raises(ConfigError, match="raise it to 53"):
        build_model(ModelConfig(vocab_size=20, dtype="fp32"), 53, seed=0)


@pytest.mark.parametrize("model_type", ["made_up", "llama"])
def test_code_and_pickles_of_a_checkpoint_are_never_run(tmp_path: Path, model_type: str) -> None:
    save_checkpoint(tmp_path, LlamaConfig(**SIZES))
    file, proof = tmp_path / "config.json", tmp_path / "ran"
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    change = {"model_type": model_type, "auto_map": code}
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    (tmp_path / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass C: ...\nclass M: ...\n")
    config = ModelConfig(checkpoint=str(tmp_path), dtype="fp32")
    if model_type == "llama":
        build_model(config, 53, seed=0)  # transformers' own code is used
    else:
        with pytest.raises(ConfigError, match="cannot load"):
            build_model(config, 53, seed=0)
    assert not proof.exists()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load"):
        build_model(config, 53, seed=0)


def test_what_attention_cannot_honour_is_refused() -> None:
    register_attention()
    config = LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    ids, _, positions = packed(LENGTHS)
    context = context_of(LENGTHS)
    call = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert model(**call, attention_context=context).logits.shape == (1, 48, 53)
    with pytest.raises(ValueError, match="needs attention_context"):
        model(**call)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(**call, attention_context=context, attention_mask=torch.ones(1, 48))
    with pytest.raises(ValueError, match="cannot honour sliding_window"):
        model(**call, attention_context=context, sliding_window=4)
    # A ready 4-D mask passes by the maker of masks; attention itself refuses it.
    dense = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot honour attention_mask"):
        model(**call, attention_context=context, attention_mask=dense)
    # One more token after a cache of 48 is not what the context describes.
    cache = model(**{**call, "use_cache": True}, attention_context=context).past_key_values
    more = {"input_ids": ids[:, :1], "position_ids": positions[:, :1], "past_key_values": cache}
    with pytest.raises(PlanError, match="gives 48 tokens"):
        model(**more, use_cache=True, attention_context=context)
    twice = {"input_ids": ids.repeat(2, 1), "position_ids": positions.repeat(2, 1)}
    with pytest.raises(ValueError, match="batch 1"):
        model(**twice, use_cache=False, attention_context=context)


@pytest.mark.parametrize(
    ("kind", "extra", "says"),
    [
        (LlamaConfig, {"attention_dropout": 0.1}, "dropout"),
        (MistralConfig, {"sliding_window": 4}, "sliding_window"),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            "sliding_window",
        ),
        (Gemma2Config, {"head_dim": 8}, "sliding_window, softcap"),
        (GptOssConfig, {"head_dim": 8}, "sliding_window, s_aux"),
    ],
)
def test_models_whose_attention_is_another_are_refused(kind: type, extra: dict, says: str) -> None:
    """Windows, score caps, sinks and dropout of the model's own are never silently left out."""
    register_attention()
    model = AutoModelForCausalLM.from_config(
        kind(**SIZES, **extra), attn_implementation=ATTENTION_NAME
    ).train()
    ids, _, positions = packed(LENGTHS)
    with pytest.raises(ValueError, match=f"cannot honour {says}"):
        model(
            input_ids=ids,
            position_ids=positions,
            use_cache=False,
            attention_context=context_of(LENGTHS),
        )
