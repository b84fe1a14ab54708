"""Where documents come from: the files of a corpus, and their texts one by one.

Every complaint names the file and, where there is one, the line or row. A text is passed on exactly
as it stands in its file; nothing is stripped or replaced.
"""

from __future__ import annotations

import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dist_attn.config import CorpusConfig
from dist_attn.errors import CorpusError

#: Third-party packages, byte code, and tests whose files hold deliberately broken encodings.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_PARQUET_ROWS = 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One text and where it stood."""

    text: str
    #: Index into the source's files.
    file: int
    #: Line of a JSONL or row of a Parquet file, counted from 1; 0 where the file is the document.
    row: int
    #: Bytes of the file up to the end of this record, for a progress bar.
    done_bytes: int


@dataclass(frozen=True)
class Source:
    """The files of a corpus and how to read them."""

    kind: str
    files: tuple[Path, ...]
    field: str

    def records(self) -> Iterator[Record]:
        """Read the texts of all files, in the order of the files."""
        read = {
            "stdlib": _read_python,
            "text": _read_text,
            "jsonl": _read_jsonl,
            "parquet": _read_parquet,
        }[self.kind]
        for file, path in enumerate(self.files):
            try:
                for row, text, done_bytes in read(path, self.field):
                    _check_text(text, self.kind, path, row)
                    yield Record(text, file, row, done_bytes)
            except OSError as error:
                raise CorpusError(f"cannot read {path}: {error.strerror or error}") from None


def document_name(kind: str, file: str, row: int) -> str:
    """How messages call a document."""
    unit = {"jsonl": "line", "parquet": "row", "megatron": "document"}.get(kind)
    return f"{file} {unit} {row}" if unit else file


def find_source(config: CorpusConfig) -> Source:
    """List the files of a corpus of texts, sorted by path.

    Raises:
        CorpusError: the path does not exist or holds no such file.
    """
    if config.kind == "stdlib":
        return Source("stdlib", tuple(_stdlib_files()), config.field)
    assert config.path is not None
    root = Path(config.path).expanduser()
    if not root.exists():
        raise CorpusError(f"data.corpus.path {root} does not exist")
    pattern = config.glob if config.kind == "text" else f"**/*.{config.kind}"
    if root.is_dir():
        for _ in os.walk(root, onerror=_unreadable):
            pass  # glob would pass over an unreadable folder in silence
        try:
            found = sorted(p for p in root.glob(pattern) if p.is_file())
        except (ValueError, NotImplementedError) as error:  # pathlib's word for absolute patterns
            raise CorpusError(f"data.corpus.glob {pattern!r} cannot be used: {error}") from None
    else:
        found = [root]
    if not found:
        raise CorpusError(f"data.corpus.path {root} holds no file that matches {pattern!r}")
    return Source(config.kind, tuple(found), config.field)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, children, names in os.walk(root):
        children[:] = [c for c in children if c not in _NOT_STDLIB]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise CorpusError(
            f"{root} holds no Python source files; this Python keeps its library elsewhere, "
            f"so choose another data.corpus.kind"
        )
    return found


def _unreadable(error: OSError) -> None:
    raise CorpusError(f"cannot read the folder {error.filename}: {error.strerror}")


def _read_python(path: Path, field: str) -> Iterator[tuple[int, str, int]]:
    try:
        with tokenize.open(path) as handle:
            text = handle.read()
    except UnicodeDecodeError as error:
        raise CorpusError(_bad_encoding(path, error, error.start)) from None
    except SyntaxError as error:
        raise CorpusError(f"{path} declares no usable encoding: {error.msg}") from None
    yield 0, text, path.stat().st_size


def _read_text(path: Path, field: str) -> Iterator[tuple[int, str, int]]:
    data = path.read_bytes()
    try:
        yield 0, data.decode("utf-8"), len(data)
    except UnicodeDecodeError as error:
        raise CorpusError(_bad_encoding(path, error, error.start)) from None


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[int, str, int]]:
    done_bytes = 0
    empty = True
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            start, done_bytes = done_bytes, done_bytes + len(line)
            body = line.removeprefix(_BOM) if number == 1 else line
            if not body.strip():
                continue
            empty = False
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                at = start + len(line) - len(body) + error.start
                raise CorpusError(_bad_encoding(f"{path} line {number}", error, at)) from None
            yield number, _field_of(text, field, f"{path} line {number}"), done_bytes
    if empty:
        raise CorpusError(f"{path} is empty: it holds no line; fill or remove it")


def _field_of(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        shown = line if len(line) <= 60 else line[:57] + "..."
        raise CorpusError(f"{where} is not valid JSON: {error}: {shown.rstrip()}") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{where} must hold a JSON object, got {type(row).__name__}")
    if field not in row:
        known = ", ".join(map(repr, list(row)[:8])) or "none"
        raise CorpusError(
            f"{where} has no field '{field}'; it has {known}; set data.corpus.field to the one "
            f"that holds the text"
        )
    return _string(row[field], f"field '{field}'", where)


def _read_parquet(path: Path, field: str) -> Iterator[tuple[int, str, int]]:
    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as parquet:
            _check_column(parquet.schema_arrow, field, path)
            num_rows = parquet.metadata.num_rows
            if num_rows == 0:
                raise CorpusError(f"{path} is empty: it holds no row; fill or remove it")
            row = 0
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    where = f"{path} row {row}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise CorpusError(_bad_encoding(where, error, error.start)) from None
                    yield row, _string(text, f"column '{field}'", where), size * row // num_rows
    except pa.ArrowException as error:
        raise CorpusError(f"{path} cannot be read as Parquet: {error}") from None


def _check_column(schema: Any, field: str, path: Path) -> None:
    if field not in schema.names:
        raise CorpusError(
            f"{path} has no column '{field}'; it has {', '.join(map(repr, schema.names))}; set "
            f"data.corpus.field to the one that holds the text"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise CorpusError(f"{path}: column '{field}' must hold strings, it holds {kind}")


def _string(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        got = "null" if value is None else type(value).__name__
        raise CorpusError(f"{where}: {what} must hold a string, got {got}")
    return value


def _check_text(text: str, kind: str, path: Path, row: int) -> None:
    # JSON can spell half of a surrogate pair, which is no text and has no UTF-8 form.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{document_name(kind, str(path), row)}: character {error.start} is half a surrogate "
            f"pair ({text[error.start]!a}) and cannot be written as UTF-8; mend the text"
        ) from None


def _bad_encoding(where: Path | str, error: UnicodeDecodeError, byte: int) -> str:
    return (
        f"{where} is not valid {error.encoding.upper()}: byte {byte} is "
        f"0x{error.object[error.start]:02x} ({error.reason}); convert the file, for example with "
        f"iconv"
    )
