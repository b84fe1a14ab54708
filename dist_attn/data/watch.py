"""Whether files are still what they were when they were opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_attn.errors import CorpusError

#: Absolute path, size and time of change in nanoseconds.
State = tuple[str, int, int]


def states(files: Iterable[Path]) -> list[State]:
    """The states of files now.

    Raises:
        CorpusError: one is not there.
    """
    found = []
    for path in files:
        try:
            state = path.stat()
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None
        found.append((str(path.absolute()), state.st_size, state.st_mtime_ns))
    return found


def differences(before: Sequence[State]) -> list[str]:
    """What became of files since then, one text for each that is gone or changed."""
    found = []
    for path, size, changed_ns in before:
        try:
            now = os.stat(path)
        except OSError as error:
            found.append(f"{path} cannot be read any more ({error.strerror})")
            continue
        if now.st_size != size:
            found.append(f"{path} has {now.st_size} bytes instead of {size}")
        elif now.st_mtime_ns != changed_ns:
            found.append(f"{path} was written to")
    return found


class MappedFile:
    """A file under a memory map, looked at through a descriptor of its own.

    Removing the file, or putting another in its place, leaves the map as it is. Writing into it
    changes the tokens under the run, and cutting it short ends the process by a signal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = path.open("rb")
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None
        self._before = os.fstat(self._handle.fileno())

    def check(self) -> None:
        """Raise CorpusError when the file was written to since it was opened."""
        before, now = self._before, os.fstat(self._handle.fileno())
        if (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
            return
        raise CorpusError(
            f"{self._path} was written to while the run reads it ({before.st_size} bytes then, "
            f"{now.st_size} now), so that its tokens are not those the run began with; put the "
            f"file back as it was and --resume (a cached corpus: delete its folder)"
        )

    def lost(self) -> str | None:
        """What happened to the name, if it no longer leads to the file that is open."""
        try:
            now = self._path.stat()
        except OSError as error:
            return f"{self._path} cannot be read any more ({error.strerror})"
        if (now.st_dev, now.st_ino) != (self._before.st_dev, self._before.st_ino):
            return f"{self._path} is another file now"
        return None
