"""Reading document lengths from a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from dist_attn.errors import PlanError


def read_lengths(path: str | Path) -> list[int]:
    """Read one length per line (also .gz), or a JSON list of lengths.

    Raises:
        PlanError: the file cannot be read, or names the line that is no length.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read lengths from {path}: {error}") from None
    if text.lstrip().startswith("["):
        return _from_json(path, text)
    lengths = []
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            continue
        if not (word.isascii() and word.isdigit()):
            raise PlanError(
                f"{path}, line {number}: a length is a whole number of tokens, got '{word[:40]}'"
            )
        lengths.append(int(word))
    if not lengths:
        raise PlanError(f"{path} holds no lengths; write one per line, or a JSON list")
    return lengths


def _from_json(path: Path, text: str) -> list[int]:
    try:
        data: Any = json.loads(text)
    except ValueError as error:
        raise PlanError(f"{path} is not valid JSON: {error}") from None
    for index, value in enumerate(data):
        if type(value) is not int or value < 0:
            raise PlanError(
                f"{path}, entry {index}: a length is a whole number of tokens, got {value!r}"
            )
    if not data:
        raise PlanError(f"{path} holds an empty list; give at least one length")
    return data
