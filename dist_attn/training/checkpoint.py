"""Checkpoints that are complete or absent, and that any number of ranks and any engine can read.

A checkpoint is a folder `step-000040` with one safetensors file per rank and a manifest:

    state-00000-of-00004.safetensors   this rank's float32 fragments, keys `<state>|<start>|<name>`,
                                       and its random state
    manifest.json                      step, data position, configuration, where each fragment of
                                       each parameter lies, size and sha256 of every file

A fragment is a part of a parameter (see `Fragment`), so that a reader takes the elements it needs
from whichever files hold them: no gathering when written, no conversion when the number of ranks,
the ZeRO stage, the degree of tensor parallelism or the engine changes. The folder is written under
another name and renamed when every byte of it is on disk. Nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
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
from dist_attn.training.regions import Region, overlap, regions
from dist_attn.training.runtime import Runtime

VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True)
class TrainState:
    """What a run is at, besides its weights."""

    #: Optimizer steps done.
    step: int
    #: The sampler's position of the next batch.
    epoch: int
    offset: int
    #: Tokens trained so far.
    tokens: int
    #: The resolved configuration as plain data, the corpus's fingerprint among it.
    identity: dict[str, Any]
    #: Steps that were left out because their gradients were not finite.
    skipped: int = 0
    #: The stage of the last step done.
    stage: int = 0


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
        _sync(partial / name)
        written = {"file": name, "sha256": _sha256(partial / name)}
        written["bytes"] = (partial / name).stat().st_size
        written["fragments"] = [(f.name, f.start, f.numel, f.run) for f in fragments]
    shapes = {f.name: f.shape for f in fragments}
    files = runtime.gather((written, shapes))
    with runtime.together(), _Writing(final):
        if runtime.is_main:
            _finish(partial, final, state, files)


def has_checkpoint(folder: Path) -> bool:
    """Whether any checkpoint was completed there."""
    return (folder / LATEST).is_file()


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint to resume from: `latest`, or the path or name of one.

    Raises:
        CheckpointError: there is none.
    """
    if wanted != "latest":
        for path in (Path(wanted), folder / wanted):
            if (path / MANIFEST).is_file():
                return path
        raise CheckpointError(
            f"--resume {wanted}: no checkpoint there ({MANIFEST} is missing); {_choices(folder)}"
        )
    pointer = folder / LATEST
    if not pointer.is_file():
        raise CheckpointError(
            f"--resume: {folder} holds no checkpoint yet; start without --resume, or name the run "
            f"folder with --set run.dir=..."
        )
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{pointer} names {path.name}, which is gone; {_choices(folder)}")
    return path


def read_state(path: Path) -> TrainState:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: it is damaged or of another version.
    """
    manifest = _read_manifest(path)
    return TrainState(**manifest["state"])


def load_checkpoint(path: Path, engine: Engine, runtime: Runtime) -> None:
    """Check every file, then fill the engine's fragments and the random state.

    Nothing of the engine is changed unless every file is whole.

    Collective: by all ranks.

    Raises:
        CheckpointError: on every rank, naming the file that is damaged or the parameter that
            does not fit.
    """
    with runtime.together():
        manifest = _read_manifest(path)
        _verify(path, manifest, runtime)
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
    manifest = _read_manifest(path)
    _verify(path, manifest, Runtime(0, 1, 0, 1, torch.device("cpu")))
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
        "version": VERSION,
        "state": vars(state),
        "world_size": len(files),
        "files": [written for written, _ in files],
        "shapes": {name: shape for _, shapes in files for name, shape in shapes.items()},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _sync(partial / MANIFEST)
    _sync(partial)
    if final.exists():
        # Resumed from before this step: the new one takes the old one's place.
        shutil.rmtree(final)
    os.rename(partial, final)
    temporary = final.parent / f".{LATEST}"
    temporary.write_text(final.name + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, final.parent / LATEST)
    _sync(final.parent)


def _prune(folder: Path, keep: int) -> None:
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    older = [p for p in sorted(folder.glob("step-*")) if p.name < latest]
    for path in older[: max(0, len(older) - (keep - 1))]:
        shutil.rmtree(path)


def _choices(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("step-*") if (p / MANIFEST).is_file())
    return f"whole ones in {folder}: {', '.join(names) or 'none'}"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} cannot be read ({error}); {_choices(path.parent)}"
        ) from None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of checkpoint version {version}; this program reads version {VERSION}"
        )
    return dict(manifest)


def _verify(path: Path, manifest: dict[str, Any], runtime: Runtime) -> None:
    """Each rank checks its share of the files against the manifest."""
    for entry in manifest["files"][runtime.rank :: runtime.world_size]:
        file = path / entry["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            what = "is missing" if size is None else f"has {size} of {entry['bytes']} bytes"
        elif _sha256(file) != entry["sha256"]:
            what = "has another content than was written (sha256)"
        else:
            continue
        raise CheckpointError(
            f"checkpoint file {file} {what}; resume from another by --resume NAME; "
            f"{_choices(path.parent)}"
        )


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
