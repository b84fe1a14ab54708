"""megatron.core's GPTModel with our attention: a layer spec, rotary angles, and what they need.

In a script of one's own, or in Megatron-LM (`--spec dist_attn.integrations.megatron layer_spec`):

    from dist_attn.integrations.megatron import PackedContext, attach

    model = attach(GPTModel(..., transformer_layer_spec=layer_spec))
    model(input_ids, position_ids, None, labels=labels,
          packed_seq_params=PackedContext(position_ids=position_ids, attention_context=context))

Megatron's context parallelism stays at size 1: which ranks attend together is said by the context
of each micro-batch and may change from one to the next.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_attn.attention.api import attend_with_context
from dist_attn.attention.context import AttentionContext
from dist_attn.errors import ConfigError
from dist_attn.integrations.recompute import Recompute
from dist_attn.integrations.rotary import Frequencies, rotary_angles

# Its FSDP, which is not used, says at import which version of itself it is.
logging.getLogger("megatron.core.distributed.fsdp").setLevel(logging.WARNING)
with warnings.catch_warnings():
    # It says once per file that Transformer Engine and Apex are not installed.
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex)", category=UserWarning)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer


@dataclass
class PackedContext(PackedSeqParams):
    """What a micro-batch's layers need, in the argument that Megatron hands to each of them.

    `qkv_format` stays "sbhd": with "thd" Megatron would rotate by positions of its own.
    """

    qkv_format: str = "sbhd"
    #: int64 [1, L], positions inside each document.
    position_ids: Tensor | None = None
    #: int64 [1, L], lengths of the tokens' documents, for rotary scalings that depend on them.
    document_tokens: Tensor | None = None
    attention_context: AttentionContext | None = None


class DistAttention(MegatronModule):
    """A `core_attention` that carries out the attention context of the micro-batch."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ConfigError(
                f"Megatron's context_parallel_size must be 1, got {config.context_parallel_size}: "
                f"the groups of dist_attn come with every micro-batch"
            )
        if config.attention_dropout:
            raise ConfigError(
                f"dist_attn has no attention dropout, got {config.attention_dropout}; set it to 0"
            )
        if config.window_size is not None:
            raise ConfigError(
                f"window_size {config.window_size} is not read here; say what may attend to what "
                f"by the mask of the attention context"
            )
        #: Counted from 1, as Megatron does.
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            query: [L, 1, H, D], rotated; H and K are this tensor rank's heads.
            key: [L, 1, K, D].
            value: [L, 1, K, D].
            attention_mask: must be None.
            attn_mask_type: not read, the context's mask says everything.
            attention_bias: must be None.
            packed_seq_params: a `PackedContext`.

        Returns:
            [L, 1, H * D].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "dist_attn takes no attention_mask and no attention_bias; say what may attend to "
                "what by the mask of the attention context, and pass None "
                "(--no-create-attention-mask-in-dataloader in Megatron-LM)"
            )
        if query.shape[1] != 1:
            raise ValueError(
                f"dist_attn takes packed tokens, micro-batch size 1, got {query.shape[1]}"
            )
        context = _context_of(packed_seq_params).attention_context
        assert context is not None
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        context = context.of_layer(self.layer_number - 1)
        out_LHD = attend_with_context(q, k, v, context, softmax_scale=self.softmax_scale)
        return out_LHD.flatten(1).unsqueeze(1)


class ExplicitRotary(nn.Module):
    """Rotary angles of the positions that the micro-batch states, wherever they lie.

    It takes the place of a model's `rotary_pos_emb`, which counts positions from 0 and cuts them
    for a static context-parallel group.

    Numerics: position times frequency in float64, less whole turns, then float32; the angle is good
    to 4e-7 at any position, and Megatron takes its sine and cosine in float32.
    """

    def __init__(self, found: Frequencies, interleaved: bool = False) -> None:
        super().__init__()
        # Not a buffer: a cast of the model to bf16 would take it along.
        self.frequencies = found
        self.interleaved = interleaved

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions and documents' lengths, which `forward` is then called with."""
        packed = _context_of(packed_seq_params)
        assert packed.position_ids is not None
        return packed.position_ids, packed.document_tokens

    def forward(
        self,
        places: tuple[Tensor, Tensor | None],
        packed_seq: bool = False,
        cp_group: Any = None,
    ) -> Tensor:
        """Angles [L, 1, 1, D], float32, of positions [1, L] and lengths of documents [1, L]."""
        position_ids, document_tokens = places
        self.frequencies = self.frequencies.to(position_ids.device)
        lengths = None if document_tokens is None else document_tokens.flatten()
        inv_freq = self.frequencies.of_documents(lengths)
        angles = rotary_angles(position_ids.flatten(), inv_freq)
        if self.interleaved:
            both = torch.stack((angles, angles), dim=-1).flatten(1)
        else:
            both = torch.cat((angles, angles), dim=-1)
        return both[:, None, None, :]


class RecomputedLayer(TransformerLayer):
    """A transformer layer whose activations are computed again in the backward."""

    def __init__(self, *args: Any, recompute: Recompute, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recompute = recompute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class; attention as `Recompute` says."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        packed = _context_of(kwargs.get("packed_seq_params"))
        assert packed.attention_context is not None
        context = self._recompute.context(packed.attention_context)
        kwargs["packed_seq_params"] = replace(packed, attention_context=context)
        return self._recompute.call(super().forward, *args, **kwargs)


def make_layer_spec(
    *, recompute: Recompute | None = None, qk_layernorm: bool = False
) -> ModuleSpec:
    """A decoder layer of Megatron's own modules (RMSNorm) with our attention.

    Args:
        recompute: compute activations again in the backward instead of keeping them; None: do not.
        qk_layernorm: norms of queries and keys, as the configuration's `qk_layernorm` says.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    if recompute is not None:
        spec.module = RecomputedLayer
        spec.params = {**(spec.params or {}), "recompute": recompute}
    return use_dist_attn(spec)


def use_dist_attn(spec: ModuleSpec) -> ModuleSpec:
    """Put our attention into a decoder layer's spec, whatever its other modules; returns it."""
    spec.submodules.self_attention.submodules.core_attention = DistAttention
    return spec


#: For Megatron-LM's `--spec`.
layer_spec = make_layer_spec()


def attach(model: GPTModel) -> GPTModel:
    """Give a rotary GPTModel angles of explicit positions; returns the model.

    Raises:
        ConfigError: the model has no rotary embedding of the plain kind.
    """
    stock: Any = getattr(model, "rotary_pos_emb", None)
    if model.position_embedding_type != "rope" or not hasattr(stock, "inv_freq"):
        raise ConfigError(
            f"attach needs position_embedding_type 'rope', got '{model.position_embedding_type}'"
        )
    factor = stock.seq_len_interpolation_factor or 1.0
    inv_freq = stock.inv_freq.detach().double() / factor
    model.rotary_pos_emb = ExplicitRotary(Frequencies(inv_freq), stock.rotary_interleaved)
    return model


def _context_of(packed_seq_params: PackedSeqParams | None) -> PackedContext:
    if (
        not isinstance(packed_seq_params, PackedContext)
        or packed_seq_params.position_ids is None
        or packed_seq_params.attention_context is None
    ):
        raise ValueError(
            "dist_attn needs packed_seq_params=PackedContext(position_ids=..., "
            "attention_context=...) in the model call; it says which documents and which ranks "
            f"the tokens belong to; got {type(packed_seq_params).__name__}"
        )
    return packed_seq_params
