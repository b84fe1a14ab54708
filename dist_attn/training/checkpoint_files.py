"""Which checkpoints a folder holds, and whether they are what was written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_attn.errors import CheckpointError, DamagedCheckpointError
from dist_attn.training.runtime import Runtime

logger = logging.getLogger(__name__)

VERSION = 3
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


def has_checkpoint(folder: Path) -> bool:
    """Whether any checkpoint was completed there."""
    return (folder / LATEST).is_file() or bool(completed(folder))


def completed(folder: Path) -> list[Path]:
    """Every checkpoint that was completed, the newest first."""
    found = [p for p in folder.glob("step-*") if (p / MANIFEST).exists() and p.name[5:].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint that is asked for: `latest`, or the path or name of one.

    Raises:
        CheckpointError: there is none.
    """
    if wanted != LATEST:
        for path in (Path(wanted), folder / wanted):
            if (path / MANIFEST).is_file():
                return path
        raise CheckpointError(
            f"--resume {wanted}: no checkpoint there ({MANIFEST} is missing); {choices(folder)}"
        )
    pointer = folder / LATEST
    if not pointer.is_file():
        raise CheckpointError(
            f"--resume: {folder} holds no checkpoint yet; start without --resume, or name the run "
            f"folder with --set run.dir=..."
        )
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{pointer} names {path.name}, which is gone; {choices(folder)}")
    return path


def choose_checkpoint(folder: Path, wanted: str, runtime: Runtime) -> tuple[Path, TrainState]:
    """The checkpoint to go on from, after every byte of it was checked.

    One that is named must be whole. `latest` is the newest whole one: one that was damaged since
    it was written is passed over, and rank 0 says so.

    Collective: by all ranks, each of which reads its share of the files.

    Raises:
        CheckpointError: on every rank; there is none, or none that is whole.
    """
    if wanted != LATEST:
        with runtime.together():
            path = find_checkpoint(folder, wanted)
        try:
            return path, _checked(path, runtime)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}; --resume without a name takes the newest whole one; {choices(folder)}"
            ) from None
    damage: list[str] = []
    for path in _candidates(folder, runtime):
        try:
            state = _checked(path, runtime)
        except DamagedCheckpointError as error:
            damage.append(str(error))
            continue
        if damage and runtime.is_main:
            logger.warning(
                "WARNING: %s. Going on from %s, the newest whole checkpoint; the steps from %d on "
                "are trained again",
                "; ".join(damage), path, state.step,
            )  # fmt: skip
        return path, state
    raise CheckpointError(f"{'; '.join(damage)}; no checkpoint in {folder} is whole")


def _candidates(folder: Path, runtime: Runtime) -> list[Path]:
    """From the one that `latest` names downwards: later ones are of an abandoned continuation."""
    newest_first: list[Path] = []
    with runtime.together():
        if runtime.is_main:
            newest_first = completed(folder)
            pointer = folder / LATEST
            named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
            if named.removeprefix("step-").isdigit():
                newest = folder / named
                below = [p for p in newest_first if step_of(p) < step_of(newest)]
                newest_first = [newest, *below]
            elif not newest_first:
                find_checkpoint(folder, LATEST)
    chosen: list[Path] = runtime.broadcast(newest_first)
    return chosen


def _checked(path: Path, runtime: Runtime) -> TrainState:
    with runtime.together():
        manifest = read_manifest(path)
        verify(path, manifest, runtime)
    return TrainState(**manifest["state"])


def choices(folder: Path) -> str:
    """The checkpoints of a folder, for messages."""
    names = sorted(p.name for p in completed(folder))
    return f"there are in {folder}: {', '.join(names) or 'none'}"


def read_state(path: Path) -> TrainState:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: it is damaged or of another version.
    """
    return TrainState(**read_manifest(path)["state"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which holds a checksum of itself.

    Raises:
        CheckpointError: it is damaged or of another version.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, digest = manifest["version"], manifest.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of checkpoint version {version}; this program reads version {VERSION}"
        )
    if digest != _digest(manifest):
        raise DamagedCheckpointError(
            f"{path / MANIFEST} has another content than was written (sha256)"
        )
    return dict(manifest)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, with the version and a checksum."""
    # As it will be read: JSON has no tuples.
    content = json.loads(json.dumps({"version": VERSION, **manifest}))
    text = json.dumps({**content, "sha256": _digest(content)})
    (path / MANIFEST).write_text(text, encoding="utf-8")
    sync(path / MANIFEST)


def verify(path: Path, manifest: dict[str, Any], runtime: Runtime) -> None:
    """Let each rank check its share of the files against the manifest.

    Raises:
        DamagedCheckpointError: naming the file and what is wrong with it.
    """
    for entry in manifest["files"][runtime.rank :: runtime.world_size]:
        file = path / entry["file"]
        try:
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                what = "is missing" if size is None else f"has {size} of {entry['bytes']} bytes"
            elif sha256(file) != entry["sha256"]:
                what = "has another content than was written (sha256)"
            else:
                continue
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
        raise DamagedCheckpointError(f"checkpoint file {file} {what}")


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Return when a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
