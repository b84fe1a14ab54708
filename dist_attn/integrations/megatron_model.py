"""A megatron.core GPTModel of the same sizes and weights as a transformers Llama."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dist_attn.config import ModelConfig
from dist_attn.errors import ConfigError
from dist_attn.integrations.hf import CausalLM
from dist_attn.integrations.loss import loss_function
from dist_attn.integrations.megatron import DistAttention, ExplicitRotary, make_layer_spec
from dist_attn.integrations.megatron_groups import MegatronGroups
from dist_attn.integrations.megatron_loss import vocab_parallel_linear_cross_entropy
from dist_attn.integrations.megatron_mlp import tile_megatron_mlps
from dist_attn.integrations.megatron_weights import Sizes, WeightMap
from dist_attn.integrations.recompute import Recompute
from dist_attn.integrations.rotary import ExactRotary, Frequencies

#: Families that are Llama in all but name: no biases, no norms of queries and keys.
SUPPORTED_MODEL_TYPES = ("llama", "mistral")


class MegatronCausalLM(GPTModel):
    """A GPTModel that returns the summed loss of this rank's tokens.

    Called with `labels` [1, L], -100 where nothing is predicted, and a `PackedContext`; `loss_mask`
    [1, L] are the weights of the tokens' losses.
    """

    def __init__(
        self, config: TransformerConfig, sizes: Sizes, model: ModelConfig, hf: CausalLM, pgs: Any
    ) -> None:
        super().__init__(
            config,
            make_layer_spec(recompute=Recompute.from_config(model)),
            vocab_size=sizes.vocab_rows * sizes.degree,
            max_sequence_length=hf.hf_config.max_position_embeddings,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=hf.hf_config.tie_word_embeddings,
            pg_collection=pgs,
        )
        self.rotary_pos_emb = ExplicitRotary(_frequencies(hf))
        if model.mlp_tile_tokens is not None:
            tile_megatron_mlps(self, model.mlp_tile_tokens)
        self._sizes = sizes
        self._loss = loss_function(model)
        self._loss_chunk_tokens = model.loss_chunk_tokens

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        if self._sizes.real_vocab_rows < self._sizes.vocab_rows:
            weight = weight[: self._sizes.real_vocab_rows]
        hidden, labels = hidden_states.flatten(0, 1), labels.flatten()
        weights = None if loss_mask is None else loss_mask.flatten()
        if self.tp_group.size() == 1:
            return self._loss(hidden, weight, labels, weights)
        return vocab_parallel_linear_cross_entropy(
            hidden,
            weight,
            labels,
            first_row=self._sizes.first_vocab_row,
            group=self.tp_group,
            weights_L=weights,
            chunk_tokens=self._loss_chunk_tokens,
        )

    def set_rotary(self, found: Frequencies) -> None:
        """Rotate by other frequencies from now on."""
        self.rotary_pos_emb.frequencies = found
        for module in self.modules():
            if isinstance(module, DistAttention):
                module.softmax_scale = softmax_scale(self._sizes.head_dim, found)


def build_megatron_model(
    hf: CausalLM, config: ModelConfig, groups: MegatronGroups, device: torch.device
) -> tuple[MegatronCausalLM, WeightMap]:
    """Build this rank's part of the Megatron model that computes what `hf` does.

    Raises:
        ConfigError: the family or its rotary scaling is not supported, or tensor parallelism does
            not divide its heads, key/value heads or MLP.
    """
    check_model(hf, groups.tensor.size())
    c = hf.hf_config
    sizes = Sizes(
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=_head_dim(c),
        intermediate_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        degree=groups.tensor.size(),
        tensor_rank=groups.tensor.rank(),
    )
    weights = dict(hf.named_parameters())
    dtype = next(iter(weights.values())).dtype
    transformer = _transformer_config(hf, sizes, dtype)
    model = MegatronCausalLM(transformer, sizes, config, hf, groups.collection)
    model.to(dtype=dtype)
    mapping = WeightMap(model, {n: tuple(p.shape) for n, p in weights.items()}, sizes)
    mapping.load(model, weights)
    for name, param in model.named_parameters():
        set_tensor_model_parallel_attributes(
            param, is_parallel=mapping.is_divided(name), dim=mapping.cut_dim(name), stride=1
        )
    model.to(device)
    model.train()
    return model, mapping


def check_model(hf: CausalLM, degree: int) -> None:
    """Raise ConfigError for a model that this engine cannot carry out; needs no process group."""
    c = hf.hf_config
    if c.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.checkpoint is of type '{c.model_type}'; engine 'megatron' supports "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}, engine 'deepspeed' this one too"
        )
    biases = [n for n, _ in hf.named_parameters() if n.endswith(".bias")]
    if biases or c.hidden_act != "silu":
        what = f"biases ({biases[0]}, ...)" if biases else f"the activation '{c.hidden_act}'"
        raise ConfigError(
            f"model.checkpoint has {what}, which engine 'megatron' does not support; use engine "
            f"'deepspeed'"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(c, name) % degree:
            raise ConfigError(
                f"engine.tensor_parallel_degree {degree} does not divide {name} "
                f"{getattr(c, name)} of the model; use a degree that divides it"
            )


def _frequencies(hf: CausalLM) -> Frequencies:
    rotary = hf.model.rotary_emb
    assert isinstance(rotary, ExactRotary)
    return rotary.frequencies


def softmax_scale(head_dim: int, found: Frequencies) -> float:
    """Factor of scores: Megatron rotates by plain angles, so that their scaling is in here.

    It is that of rotated queries times that of rotated keys.
    """
    return float(head_dim**-0.5 * found.attention_scaling**2)


def _head_dim(hf_config: Any) -> int:
    given = getattr(hf_config, "head_dim", None)
    return int(given or hf_config.hidden_size // hf_config.num_attention_heads)


def _transformer_config(hf: CausalLM, sizes: Sizes, dtype: torch.dtype) -> TransformerConfig:
    c = hf.hf_config
    return TransformerConfig(
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        ffn_hidden_size=c.intermediate_size,
        num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads,
        kv_channels=sizes.head_dim,
        softmax_scale=softmax_scale(sizes.head_dim, _frequencies(hf)),
        normalization="RMSNorm",
        layernorm_epsilon=c.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=sizes.degree,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # The weights come from the transformers model, made on the host.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Fused kernels come with Transformer Engine or Apex, which this does without.
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
    )
