"""transformers models whose attention is ours: registration, construction, loss head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from dist_attn.attention.api import attend_with_context
from dist_attn.attention.context import AttentionContext
from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.fused import fuse, liger_gate
from dist_attn.integrations.lora import add_adapters
from dist_attn.integrations.loss import LossFunction, loss_function
from dist_attn.integrations.recompute import Recompute
from dist_attn.integrations.rotary import ExactRotary, Frequencies, frequencies
from dist_attn.integrations.tiled_mlp import silu_gate, tile_mlps

ATTENTION_NAME = "dist_attn"
#: Families whose attention layers call the interface with nothing but rotated q, k, v and a scale.
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Keywords that change what attention computes; any other value than None is refused.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")


def register_attention() -> None:
    """Make `attn_implementation="dist_attn"` known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_dense_mask)


class CausalLM(nn.Module):
    """A transformers decoder that returns the summed loss of this rank's tokens.

    Parameter names are those of the transformers model.
    """

    def __init__(self, decoder: PreTrainedModel, loss: LossFunction) -> None:
        super().__init__()
        self.model = decoder.model
        self.lm_head = _LossHead(decoder.lm_head, loss)
        self.hf_config = decoder.config

    def forward(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        position_ids: Tensor,
        attention_context: AttentionContext,
        document_tokens: Tensor | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        """Sum of the cross-entropy over local tokens, float32, not yet divided by anything.

        Args:
            input_ids: int64 [1, L], this rank's tokens.
            shift_labels: int64 [1, L], the token to predict, -100 where there is none.
            position_ids: int64 [1, L], positions inside each document.
            attention_context: how this micro-batch's attention is carried out.
            document_tokens: int64 [1, L], the length of each token's document, for rotary scalings
                that depend on it.
            loss_weights: float32 [1, L], by which each token's loss counts; None: 1.
        """
        self.model.rotary_emb.document_tokens = document_tokens
        hidden = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            attention_context=attention_context,
        ).last_hidden_state
        loss: Tensor = self.lm_head(hidden, shift_labels, loss_weights)
        return loss


class _LossHead(nn.Module):
    """The vocabulary projection and the loss in one module, so that ZeRO-3 gathers its weight."""

    def __init__(self, linear: nn.Linear, loss: LossFunction) -> None:
        super().__init__()
        if linear.bias is not None:
            raise ConfigError("a vocabulary projection with a bias is not supported")
        self.weight: Tensor = linear.weight
        self._loss: LossFunction = loss

    def forward(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = None if weights is None else weights.flatten()
        return self._loss(hidden.flatten(0, 1), self.weight, labels.flatten(), weights)


def build_model(config: ModelConfig, vocab_size: int, seed: int) -> CausalLM:
    """Build a Llama from the configured sizes, or load a local checkpoint folder.

    Initial weights depend on `seed` alone.

    Raises:
        ConfigError: the checkpoint is missing, of an unsupported family, or its vocabulary is
            smaller than the tokenizer's.
    """
    register_attention()
    if config.checkpoint is not None:
        decoder = _load(config, vocab_size)
    else:
        torch.manual_seed(seed)
        decoder = AutoModelForCausalLM.from_config(
            _llama_config(config, vocab_size), attn_implementation=ATTENTION_NAME
        )
    decoder.model.rotary_emb = ExactRotary(model_frequencies(config, decoder.config))
    nn.Module.to(decoder, dtype=_DTYPES[config.dtype])
    if config.lora is not None:
        add_adapters(decoder, config.lora, seed)
    if config.kernels == "liger":
        fuse(decoder, _attention)
    if config.mlp_tile_tokens is not None:
        gate = liger_gate() if config.kernels == "liger" else silu_gate
        tile_mlps(decoder, config.mlp_tile_tokens, gate)
    recompute = Recompute.from_config(config)
    if recompute is not None:
        # Of the public way in only the function could not be chosen.
        decoder._set_gradient_checkpointing(True, recompute.transformers)
    decoder.train()
    return CausalLM(decoder, loss_function(config))


def save_for_transformers(
    config: ModelConfig, parameters: dict[str, Tensor], folder: Path, max_positions: int
) -> None:
    """Write trained parameters as a folder that transformers (and `model.checkpoint`) loads.

    Args:
        config: the model section that the parameters were trained with; its dtype is that of the
            files.
        parameters: every parameter by its name, float32.
        folder: where config.json and safetensors files go.
        max_positions: the longest document trained on, for config.json.
    """
    vocab_size = parameters["model.embed_tokens.weight"].shape[0]
    if config.checkpoint is not None:
        hf_config = AutoConfig.from_pretrained(
            config.checkpoint, local_files_only=True, trust_remote_code=False
        )
    else:
        hf_config = _llama_config(config, vocab_size)
        hf_config.max_position_embeddings = max_positions
    if config.rope is not None:
        _describe_rope(hf_config, rope_parameters(config, hf_config), max_positions)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(hf_config)
    dtype = _DTYPES[config.dtype]
    weights = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    missing, unexpected = decoder.load_state_dict(weights, strict=False, assign=True)
    decoder.tie_weights()
    left = [n for n, p in decoder.named_parameters() if p.is_meta]
    assert not left, f"parameters are missing: {missing}"
    assert not unexpected, f"parameters of another model: {unexpected}"
    decoder.config.use_cache = True
    decoder.config.dtype = dtype
    decoder.save_pretrained(folder)


def model_frequencies(config: ModelConfig, hf_config: Any) -> Frequencies:
    """What positions are multiplied with in a model, by its configuration or its checkpoint's.

    Raises:
        ConfigError: a scaling that is not supported or does not fit the head dimension.
    """
    head_dim = getattr(hf_config, "head_dim", None)
    head_dim = head_dim or hf_config.hidden_size // hf_config.num_attention_heads
    try:
        return frequencies(rope_parameters(config, hf_config), head_dim)
    except ConfigError as error:
        where = "model.rope" if config.rope is not None else "model.checkpoint"
        raise ConfigError(f"{where}: {error}") from None


def rope_parameters(config: ModelConfig, hf_config: Any) -> dict[str, Any]:
    """Complete `rope_parameters`: of the configuration, else of the model."""
    own = dict(hf_config.rope_parameters)
    if config.rope is not None:
        return {"rope_theta": own["rope_theta"], **config.rope.parameters()}
    # What transformers takes from elsewhere in its configuration.
    original = hf_config.max_position_embeddings
    if own.get("rope_type") == "dynamic":
        own["original_max_position_embeddings"] = original
    elif own.get("rope_type") == "longrope" and own.get("factor") is None:
        own["factor"] = original / own["original_max_position_embeddings"]
    return own


def _describe_rope(hf_config: Any, parameters: dict[str, Any], max_positions: int) -> None:
    """Write a scaling into a transformers configuration, where its formulas look for it."""
    hf_config.max_position_embeddings = max_positions
    if parameters["rope_type"] == "dynamic":
        hf_config.max_position_embeddings = parameters.pop("original_max_position_embeddings")
    hf_config.rope_parameters = parameters


def _llama_config(config: ModelConfig, vocab_size: int) -> LlamaConfig:
    size = config.vocab_size or vocab_size
    if size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {size}, but the tokenizer makes ids up to {vocab_size - 1}; "
            f"raise it to {vocab_size} or leave it out"
        )
    return LlamaConfig(
        vocab_size=size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.resolved_head_dim,
        max_position_embeddings=1 << 30,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=0.0,
        use_cache=False,
    )


def _load(config: ModelConfig, vocab_size: int) -> PreTrainedModel:
    folder = Path(str(config.checkpoint))
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.checkpoint: {folder} holds no config.json; give a folder with config.json and "
            f"safetensors files (nothing is downloaded)"
        )
    try:
        hf_config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _check_family(hf_config, folder, vocab_size)
        decoder = AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            local_files_only=True,
            # Weights without pickle, and no code from the folder.
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION_NAME,
            dtype=_DTYPES[config.dtype],
        )
    except ConfigError:
        raise
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"model.checkpoint: cannot load {folder}: {error}") from None
    decoder.config.use_cache = False
    return decoder


def _check_family(hf_config: Any, folder: Path, vocab_size: int) -> None:
    if hf_config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.checkpoint: {folder} is of type '{hf_config.model_type}'; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    layer_types = set(getattr(hf_config, "layer_types", None) or ["full_attention"])
    window = getattr(hf_config, "sliding_window", None)
    if layer_types != {"full_attention"} or (hf_config.model_type == "mistral" and window):
        raise ConfigError(
            f"model.checkpoint: {folder} uses a sliding window of {window} tokens, which this "
            f"engine does not carry out; set sliding_window to null in its config.json to train "
            f"with full attention"
        )
    if hf_config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.checkpoint: {folder} has a vocabulary of {hf_config.vocab_size}, but the "
            f"tokenizer makes ids up to {vocab_size - 1}; use the checkpoint's own tokenizer.json"
        )


def _attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, heads, L, D] in, [1, L, heads, D] out."""
    context = kwargs.get("attention_context")
    if not isinstance(context, AttentionContext):
        raise ValueError(
            'attn_implementation="dist_attn" needs attention_context=AttentionContext(...) in the '
            "model call; it says which documents and which ranks the tokens belong to"
        )
    refused = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or refused:
        what = refused or (["attention_mask"] if attention_mask is not None else ["dropout"])
        raise ValueError(
            f"dist_attn cannot honour {', '.join(what)}; say what may attend to what by the mask "
            f"of the attention_context, and set dropout to 0"
        )
    if query_BHLD.shape[0] != 1:
        raise ValueError(f"dist_attn takes packed tokens, batch 1, got {query_BHLD.shape[0]}")
    q, k, v = (x[0].transpose(0, 1) for x in (query_BHLD, key_BKLD, value_BKLD))
    layer: Any = module.layer_idx
    out_LHD = attend_with_context(q, k, v, context.of_layer(layer), softmax_scale=scaling)
    return out_LHD.unsqueeze(0), None


def _no_dense_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    if attention_mask is not None:
        raise ValueError(
            "dist_attn takes no attention_mask (padding belongs to no document of the "
            "attention_context); pass attention_mask=None"
        )
