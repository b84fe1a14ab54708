"""Liger's fused kernels in place of a transformers decoder's small operations.

RMSNorm, the gate of the MLP and the rotation of queries and keys are each one kernel that reads and
writes its operands once; as separate torch operations they take as long as the matrix products of
the layer and keep float32 copies for the backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from dist_attn.errors import ConfigError
from dist_attn.integrations.rotary import ExactRotary

#: Computes attention as transformers calls it; see `integrations.hf`.
AttentionFunction = Callable[..., tuple[Tensor, None]]


def fuse(decoder: nn.Module, attention: AttentionFunction) -> None:
    """Let a Llama-type decoder compute its norms, gates and rotations by Liger's kernels.

    Args:
        decoder: a transformers model of a supported family, its rotary embedding exact already.
        attention: what computes attention; called with rotated queries and keys.

    Numerics: the rotation in float32 with float32 sines and cosines, rounded once; transformers
        rounds sine, cosine and both products to bf16.

    Raises:
        ConfigError: Liger is not installed, or the model's activation is not its gate's.
    """
    kernels = _Kernels()
    for module in decoder.modules():
        if isinstance(module, ExactRotary):
            module.keep_float32 = True
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(kernels.norm, module)
        elif type(module).__name__.endswith("MLP"):
            _check_activation(module)
            module.forward = MethodType(kernels.mlp, module)
        elif type(module).__name__.endswith("Attention"):
            module.forward = MethodType(kernels.attention(attention), module)


def liger_gate() -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's product of a gate and an up projection."""
    return _Kernels().gate


class _Kernels:
    """The forward methods of fused modules."""

    def __init__(self) -> None:
        try:
            norm = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
            gate = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
            rope = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"model.kernels 'liger' needs the package liger-kernel ({error}); install it "
                f"(pip install liger-kernel), or set model.kernels to 'torch'"
            ) from None
        self._norm, self.gate, self._rope = norm.apply, gate.apply, rope.apply

    def norm(self, module: Any, hidden: Tensor) -> Tensor:
        result: Tensor = self._norm(hidden, module.weight, module.variance_epsilon)
        return result

    def mlp(self, module: Any, hidden: Tensor) -> Tensor:
        gated = self.gate(module.gate_proj(hidden), module.up_proj(hidden))
        result: Tensor = module.down_proj(gated)
        return result

    def attention(self, attention: AttentionFunction) -> Callable[..., tuple[Tensor, None]]:
        def forward(
            module: Any,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            heads = (*hidden_states.shape[:-1], -1, module.head_dim)
            q = module.q_proj(hidden_states).view(heads)
            k = module.k_proj(hidden_states).view(heads)
            v = module.v_proj(hidden_states).view(heads).transpose(1, 2)
            if hasattr(module, "q_norm"):
                q, k = module.q_norm(q), module.k_norm(k)
            q, k = self._rope(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
            # What the model asks for beside is refused there, as in the model's own forward.
            own = {
                "scaling": module.scaling,
                "dropout": module.attention_dropout if module.training else 0.0,
                "sliding_window": getattr(module, "sliding_window", None),
            }
            out, _ = attention(module, q, k, v, attention_mask, **own, **kwargs)
            return module.o_proj(out.flatten(2)), None

        return forward


def _check_activation(module: Any) -> None:
    name = module.config.hidden_act
    if name != "silu":
        raise ConfigError(
            f"model.kernels 'liger' gates by silu, this model by '{name}'; set model.kernels to "
            f"'torch'"
        )
