"""Low-rank adapters by peft: put into a decoder, and written as peft reads them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_attn.config import LoraConfig, ModelConfig
from dist_attn.errors import ConfigError

#: What peft calls the adapter inside parameter names, and nowhere in files.
ADAPTER = "default"


def add_adapters(decoder: nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a decoder and put adapters beside its projections.

    Their initial weights depend on `seed` alone; they change nothing until they are trained.

    Raises:
        ConfigError: peft is not installed.
    """
    torch.manual_seed(seed)
    _peft().inject_adapter_in_model(_peft_config(config), decoder, adapter_name=ADAPTER)


def save_adapters(config: ModelConfig, parameters: dict[str, Tensor], folder: Path) -> None:
    """Write trained adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        config: the model section that they were trained with; its dtype is that of the file.
        parameters: the adapters' parameters by their names in the model, float32.
        folder: where adapter_config.json and adapter_model.safetensors go.
    """
    assert config.lora is not None
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.to(dtype).contiguous()
        for name, tensor in parameters.items()
        if f".{ADAPTER}." in name
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = _peft_config(config.lora)
    described.base_model_name_or_path = config.checkpoint
    described.inference_mode = True
    described.save_pretrained(str(folder))


def _peft_config(config: LoraConfig) -> Any:
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(config.targets),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"model.lora needs the package peft ({error}); install it: pip install peft"
        ) from None
