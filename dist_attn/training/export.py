"""From a checkpoint of a run to a folder that transformers loads."""

from __future__ import annotations

import shutil
from pathlib import Path

from dist_attn.config import load_config
from dist_attn.errors import CheckpointError, ConfigError
from dist_attn.integrations.hf import save_for_transformers
from dist_attn.integrations.lora import save_adapters
from dist_attn.training.checkpoint import read_parameters
from dist_attn.training.checkpoint_files import find_checkpoint, read_state
from dist_attn.training.run_folder import RunFolder


def export(run: Path, checkpoint: str, out: Path, dtype: str | None = None) -> Path:
    """Write a run's checkpoint as config.json, safetensors and, if it has one, its tokenizer.

    Of a run with `model.lora` the adapters are written, as peft loads them onto the base model.

    Args:
        run: the run folder.
        checkpoint: `latest`, or the name or path of a checkpoint.
        out: a folder that does not exist or is empty.
        dtype: `bf16` or `fp32`; by default what the run computed in.

    Returns:
        The checkpoint that was read.

    Raises:
        ConfigError: no run there, or `out` holds something.
        CheckpointError: no such checkpoint, or a damaged one.
    """
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ConfigError(f"--run: {run} holds no run (config.yaml is missing)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} exists and is not empty; name a new folder")
    path = find_checkpoint(folder.checkpoints, checkpoint)
    config = load_config(folder.config).at_stage(read_state(path).stage)
    parameters = read_parameters(path)
    model = config.model.model_copy(update={"dtype": dtype or config.model.dtype})
    try:
        if model.lora is not None:
            save_adapters(model, parameters, out)
        else:
            save_for_transformers(model, parameters, out, config.data.max_document_tokens)
        _copy_tokenizer(config.data.tokenizer, out)
    except OSError as error:
        raise CheckpointError(f"--out: cannot write {out}: {error}") from None
    return path


def _copy_tokenizer(tokenizer: str, out: Path) -> None:
    """Put the tokenizer beside the weights; bytes need none."""
    if tokenizer == "bytes":
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(tokenizer) if name == "tokenizer.json" else Path(tokenizer).with_name(name)
        if source.is_file():
            shutil.copyfile(source, out / name)
