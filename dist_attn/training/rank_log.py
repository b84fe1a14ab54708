"""A log of each rank's own, where several ranks would else write into one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dist_attn.errors import ConfigError


def log_to(folder: Path, rank: int) -> None:
    """Let all that this process writes go to `rank-N.log` of a folder, after what is there.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = folder / f"rank-{rank}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    except OSError as error:
        raise ConfigError(f"--log-dir: cannot write {path}: {error}; name another folder") from None
