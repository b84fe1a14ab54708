"""The folder of a run: what is in it, and that nothing in it is written over."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_attn.config import Config, dump_config
from dist_attn.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run.

    config.yaml          the resolved configuration
    corpus.json          the folder of the cache that its tokens come from
    metrics.jsonl        one line per step
    plans/               the plan of each step
    checkpoints/         step-NNNNNN folders and `latest`
    tensorboard/         event files
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def plans(self) -> Path:
        """Where the plans of past and coming steps are."""
        return self.path / "plans"

    @property
    def tensorboard(self) -> Path:
        """Where TensorBoard looks."""
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        """The resolved configuration of the first start."""
        return self.path / "config.yaml"

    def check_free(self) -> None:
        """Raise ConfigError if the folder holds anything."""
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"run.dir: {self.path} is not empty; continue the run in it with --resume, or "
                f"choose another folder with --set run.dir=..."
            )

    def create(self, config: Config) -> None:
        """Make the folder of a new run.

        Raises:
            ConfigError: it holds something already, or cannot be made.
        """
        self.check_free()
        try:
            self.plans.mkdir(parents=True)
            self.config.write_text(dump_config(config), encoding="utf-8")
            self.metrics.touch()
        except OSError as error:
            raise ConfigError(f"run.dir: cannot write {self.path}: {error}") from None

    def reopen(self, config: Config, step: int) -> None:
        """Go on in the folder from a step: what was recorded after it is forgotten.

        Raises:
            CheckpointError: the folder is not a run's, or cannot be written.
        """
        if not self.metrics.is_file():
            raise CheckpointError(f"--resume: {self.path} holds no run ({self.metrics} is missing)")
        kept = [line for line in read_metrics(self.metrics) if line["step"] < step]
        draft = self.metrics.with_suffix(".draft")
        try:
            draft.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
            os.replace(draft, self.metrics)
            resumed = self.path / f"config-from-step-{step:06d}.yaml"
            resumed.write_text(dump_config(config), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"--resume: cannot write {self.path}: {error}") from None

    def begun_with(self) -> str | None:
        """The folder of the cache that the run's tokens come from, if it was recorded."""
        try:
            recorded = json.loads((self.path / "corpus.json").read_text(encoding="utf-8"))
            return Path(recorded["cache_folder"]).name
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def remember(self, cache_folder: str | None) -> None:
        """Record where in the cache the run's tokens are.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            (self.path / "corpus.json").write_text(
                json.dumps({"cache_folder": cache_folder}), encoding="utf-8"
            )
        except OSError as error:
            raise ConfigError(f"run.dir: cannot write {self.path}: {error}") from None

    def check_visible(self) -> None:
        """Raise ConfigError where a node does not see the folder that rank 0 made."""
        if not self.config.is_file():
            raise ConfigError(
                f"run.dir: {self.path} was made by rank 0 but is not seen here; put it on a file "
                f"system that every node shares"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The recorded steps; a last line that a crash cut short is left out."""
    result = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            result.append(json.loads(line))
        except ValueError:
            break
    return result
