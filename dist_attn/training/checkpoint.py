"""Checkpoints that are complete or absent, and that any number of ranks and any engine can read.

A checkpoint is a folder `step-000040` with one safetensors file per rank and a manifest:

    state-00000-of-00004.safetensors   this rank's float32 fragments, keys `<state>|<start>|<name>`,
                                       and its random state
    manifest.json                      step, data position, configuration, where each fragment of
                                       each parameter lies, size and sha256 of every file and of
                                       the manifest itself

A fragment is a part of a parameter (see `Fragment`), so that a reader takes the elements it needs
from whichever files hold them: no gathering when written, no conversion when the number of ranks,
the ZeRO stage, the degree of tensor parallelism or the engine changes. The folder is written under
another name and renamed when every byte of it is on disk. Nothing that is read can run code.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dist_attn.errors import CheckpointError
from dist_attn.integrations.engine import Engine, Fragment
from dist_attn.training.checkpoint_files import (
    LATEST,
    TrainState,
    completed,
    read_manifest,
    sha256,
    step_of,
    sync,
    verify,
    write_manifest,
)
from dist_attn.training.regions import Region, overlap, regions
from dist_attn.training.runtime import Runtime


def save_checkpoint(
    folder: Path, engine: Engine, state: TrainState, runtime: Runtime, *, keep: int
) -> Path:
    """Write `folder/step-NNNNNN` and let `folder/latest` name it; older ones beyond `keep` go.

    Collective: by all ranks.

    Raises:
        CheckpointError: on every rank, when any rank cannot write; what was there before stays.
    """
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".{final.name}.partial"
    try:
        _write(partial, final, engine, state, runtime)
        with runtime.together(), _Writing(folder):
            if runtime.is_main:
                _prune(folder, keep)
    except CheckpointError:
        # What is half written must not go on filling the disk.
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _write(partial: Path, final: Path, engine: Engine, state: TrainState, runtime: Runtime) -> None:
    if runtime.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    with runtime.together(), _Writing(partial):
        if runtime.is_main:
            partial.mkdir(parents=True)
    name = f"state-{runtime.rank:05d}-of-{runtime.world_size:05d}.safetensors"
    written: dict[str, Any] = {}
    fragments = [f for f in engine.fragments() if f.owned]
    with runtime.together(), _Writing(partial / name):
        tensors = {
            f"{key}|{f.start}|{f.name}": tensor.cpu().contiguous()
            for f in fragments
            for key, tensor in f.tensors.items()
        }
        save_file(tensors | _random_state(runtime), partial / name)
        sync(partial / name)
        written = {"file": name, "sha256": sha256(partial / name)}
        written["bytes"] = (partial / name).stat().st_size
        written["fragments"] = [(f.name, f.start, f.numel, f.run) for f in fragments]
    shapes = {f.name: f.shape for f in fragments}
    files = runtime.gather((written, shapes))
    with runtime.together(), _Writing(final):
        if runtime.is_main:
            _finish(partial, final, state, files)


def load_checkpoint(path: Path, engine: Engine, runtime: Runtime, *, checked: bool = False) -> None:
    """Check every file, then fill the engine's fragments and the random state.

    Nothing of the engine is changed unless every file is whole. What `choose_checkpoint` has
    `checked` is not read twice.

    Collective: by all ranks.

    Raises:
        CheckpointError: on every rank, naming the file that is damaged or the parameter that
            does not fit.
    """
    with runtime.together():
        manifest = read_manifest(path)
        if not checked:
            verify(path, manifest, runtime)
    fragments = engine.fragments()
    with runtime.together():
        _check_parameters(path, manifest, fragments)
    with runtime.together():
        _fill(path, manifest, fragments)
        if manifest["world_size"] == runtime.world_size:
            _restore_random_state(path / manifest["files"][runtime.rank]["file"], runtime)
    state = manifest["state"]
    engine.refresh(state["step"] - state.get("skipped", 0))


def read_parameters(path: Path) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint, whole and in float32, after checking every file.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest = read_manifest(path)
    verify(path, manifest, Runtime(0, 1, 0, 1, torch.device("cpu")))
    fragments = [
        Fragment(name, tuple(shape), 0, {"param": torch.empty(math.prod(shape))}, owned=False)
        for name, shape in manifest["shapes"].items()
    ]
    _fill(path, manifest, fragments)
    return {f.name: f.tensors["param"].view(f.shape) for f in fragments}


class _Writing:
    """Turns the operating system's refusal to write into a CheckpointError that names the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(
                f"cannot write checkpoint {self.path}: {error}; earlier checkpoints are untouched"
            ) from None


def _finish(partial: Path, final: Path, state: TrainState, files: list[Any]) -> None:
    manifest = {
        "state": vars(state),
        "world_size": len(files),
        "files": [written for written, _ in files],
        "shapes": {name: shape for _, shapes in files for name, shape in shapes.items()},
    }
    write_manifest(partial, manifest)
    sync(partial)
    if final.exists():
        # Resumed from before this step: the new one takes the old one's place.
        shutil.rmtree(final)
    os.rename(partial, final)
    temporary = final.parent / f".{LATEST}"
    temporary.write_text(final.name + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, final.parent / LATEST)
    sync(final.parent)


def _prune(folder: Path, keep: int) -> None:
    latest = Path((folder / LATEST).read_text(encoding="utf-8").strip())
    older = [p for p in completed(folder) if step_of(p) < step_of(latest)]
    for path in older[keep - 1 :]:
        shutil.rmtree(path)


def _check_parameters(path: Path, manifest: dict[str, Any], fragments: list[Fragment]) -> None:
    saved = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    for f in fragments:
        if saved.get(f.name) != f.shape:
            raise CheckpointError(
                f"checkpoint {path} holds {f.name} with shape {saved.get(f.name)}, the model has "
                f"{f.shape}; resume with the configuration of the run that wrote it"
            )


def _fill(path: Path, manifest: dict[str, Any], fragments: list[Fragment]) -> None:
    saved: dict[str, list[_Saved]] = defaultdict(list)
    for entry in manifest["files"]:
        for name, start, numel, run in entry["fragments"]:
            saved[name] += [
                _Saved(entry["file"], start, region)
                for region in regions(manifest["shapes"][name], start, numel, run)
            ]
    wanted: dict[str, list[tuple[Fragment, int, Region, Region]]] = defaultdict(list)
    for fragment in fragments:
        f, covered = fragment, 0
        for mine in regions(f.shape, f.start, f.numel, f.run):
            for there in saved[f.name]:
                shared = overlap(there.region, mine)
                if shared is not None:
                    wanted[there.file].append((f, there.start, *shared))
                    covered += shared[0].numel
        if covered != f.numel:
            raise CheckpointError(
                f"checkpoint {path} holds {covered} of {f.numel} elements of {f.name}"
            )
    for file, parts in wanted.items():
        try:
            with safe_open(path / file, framework="pt") as reader:
                for fragment, start, source, target in parts:
                    _copy(reader, fragment, start, source, target)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint file {path / file}: {error}") from None


@dataclass(frozen=True)
class _Saved:
    """A rectangle of a saved fragment."""

    file: str
    start: int
    region: Region


def _copy(reader: Any, fragment: Fragment, start: int, source: Region, target: Region) -> None:
    for key, tensor in fragment.tensors.items():
        saved = reader.get_slice(f"{key}|{start}|{fragment.name}")
        part = saved[source.offset : source.offset + source.span]
        into = tensor[target.offset : target.offset + target.span]
        into.as_strided(target.size, (target.stride, 1), into.storage_offset()).copy_(
            part.as_strided(source.size, (source.stride, 1), part.storage_offset())
        )


def _random_state(runtime: Runtime) -> dict[str, torch.Tensor]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "random|torch": torch.get_rng_state(),
        "random|python": torch.tensor([version, *words], dtype=torch.int64),
        "random|python_gauss": torch.tensor([float("nan") if gauss is None else gauss]).double(),
        "random|numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "random|numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if runtime.device.type == "cuda":
        state["random|cuda"] = torch.cuda.get_rng_state(runtime.device)
    return state


def _restore_random_state(file: Path, runtime: Runtime) -> None:
    with safe_open(file, framework="pt") as reader:
        torch.set_rng_state(reader.get_tensor("random|torch"))
        version, *words = reader.get_tensor("random|python").tolist()
        gauss = reader.get_tensor("random|python_gauss").item()
        random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
        position, has_gauss, cached = reader.get_tensor("random|numpy_rest").tolist()
        keys = reader.get_tensor("random|numpy").numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))  # noqa: NPY002
        if runtime.device.type == "cuda" and "random|cuda" in list(reader.keys()):
            torch.cuda.set_rng_state(reader.get_tensor("random|cuda"), runtime.device)
