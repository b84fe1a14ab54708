"""What `auto` means on the device at hand: dtype, kernels and loss, and why."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType

from dist_attn.config_engine import EngineConfig
from dist_attn.config_model import ModelConfig
from dist_attn.errors import ConfigError


def decide(model: ModelConfig, engine: EngineConfig, device_type: str) -> Mapping[str, str]:
    """Return the keys of `model` that are still `auto`, with what they are on `cpu` or `cuda`.

    Raises:
        ConfigError: what was asked for does not go with the device or the engine.
    """
    decided: dict[str, str] = {}
    if model.dtype == "auto":
        decided["dtype"] = "bf16" if device_type == "cuda" else "fp32"
    refusals = {
        "kernels": (model.kernels, why_no_liger_kernels(engine, device_type)),
        "loss": (model.loss, why_no_liger_loss(engine, device_type)),
    }
    for key, (wanted, reason) in refusals.items():
        if wanted == "auto":
            decided[key] = "liger" if reason is None and _missing() is None else "torch"
        elif wanted == "liger" and reason is not None:
            raise ConfigError(f"model.{key} 'liger': {reason}; set it to 'auto' or 'torch'")
    return MappingProxyType(decided)


def why_no_liger_kernels(engine: EngineConfig, device_type: str) -> str | None:
    """Say why a decoder's small operations cannot be Liger's kernels, or None."""
    if engine.name == "megatron":
        return "engine 'megatron' computes norms, gates and rotations by modules of its own"
    return _of_device(device_type)


def why_no_liger_loss(engine: EngineConfig, device_type: str) -> str | None:
    """Say why the loss cannot be Liger's kernel, or None."""
    if engine.tensor_parallel_degree > 1:
        return (
            f"with engine.tensor_parallel_degree {engine.tensor_parallel_degree} the rows of the "
            f"vocabulary lie on several ranks"
        )
    return _of_device(device_type)


def describe_loss(model: ModelConfig, engine: EngineConfig, device_type: str) -> str:
    """Say how the loss is computed, and why not otherwise, when that is decided."""
    if model.loss == "liger":
        return "loss: Liger's fused linear cross-entropy"
    reason = why_no_liger_loss(engine, device_type) or _missing() or "model.loss is 'torch'"
    return f"loss: torch's operations, {model.loss_chunk_tokens:,} tokens at a time ({reason})"


def _of_device(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"Liger's kernels run on GPUs, not on {device_type}"
    return None


def _missing() -> str | None:
    """Say that Liger is not installed here; a run that asks for it may be planned all the same."""
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (pip install liger-kernel)"
    return None
