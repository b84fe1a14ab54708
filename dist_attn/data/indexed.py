"""Megatron's indexed token files: a `.bin` with the tokens and an `.idx` that says where each is.

The `.idx` holds, little-endian and without gaps: the magic `MMIDIDX`, a version (uint64, 1), a code
for the token type (uint8), the number of sequences and of document-index entries (uint64 each), the
sequences' lengths (int32) and byte offsets into the `.bin` (int64), and the document index (int64):
document d is the sequences from entry d up to entry d + 1, joined. The number of entries is
therefore one more than the number of documents.

Source: megatron/core/datasets/indexed_dataset.py of Megatron-LM, for the format only.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dist_attn.errors import CorpusError

IntArray = npt.NDArray[np.int64]
TokenArray = npt.NDArray[Any]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("uint8"),
    2: np.dtype("int8"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_MAX_SEQUENCE_TOKENS = 2**31 - 1
_SCAN_TOKENS = 1 << 22


def bin_path(prefix: Path) -> Path:
    """Name the file of tokens that belongs to a prefix."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Name the file of offsets that belongs to a prefix."""
    return prefix.with_name(prefix.name + ".idx")


def sync_folder(folder: Path) -> None:
    """Make the renames done in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class IndexedWriter:
    """Writes a pair of files document by document; the pair appears whole or not at all.

    Use it as a context manager: leaving it normally puts the files in place (`.idx` last), leaving
    it by an exception removes what was written. Existing files are never written over.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in _DTYPES.items() if known == self._dtype]
        if not codes or self._dtype.kind == "f":
            allowed = ", ".join(d.name for d in _DTYPES.values() if d.kind != "f")
            raise CorpusError(f"indexed files hold tokens of type {allowed}; got {self._dtype}")
        self._code = codes[0]
        self._prefix = prefix
        for path in (bin_path(prefix), idx_path(prefix)):
            if path.exists():
                raise CorpusError(f"{path} exists and is not written over; remove it first")
        self._temporary = prefix.with_name(f"{prefix.name}.tmp-{os.getpid()}")
        self._lengths = array("i")
        self._documents = array("q", [0])
        self._bin: BinaryIO = bin_path(self._temporary).open("wb")

    def add_document(self, tokens: npt.ArrayLike, sequences: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: its token ids, integers [n].
            sequences: lengths of the sequences it consists of; one sequence by default.
        """
        ids = np.asarray(tokens)
        limits = np.iinfo(self._dtype)
        if ids.size and (ids.min() < limits.min or ids.max() > limits.max):
            raise CorpusError(
                f"token ids {ids.min()} to {ids.max()} do not fit {self._dtype.name} "
                f"({limits.min} to {limits.max}); choose a wider type"
            )
        lengths = [ids.size] if sequences is None else list(sequences)
        if sum(lengths) != ids.size or min(lengths, default=0) < 0:
            raise CorpusError(f"sequences {lengths} do not add up to a document of {ids.size}")
        if max(lengths, default=0) > _MAX_SEQUENCE_TOKENS:
            raise CorpusError(
                f"a sequence of {max(lengths)} tokens passes the format's {_MAX_SEQUENCE_TOKENS}; "
                f"give the document as several sequences"
            )
        self._bin.write(ids.astype(self._dtype, copy=False).tobytes())
        self._lengths.extend(lengths)
        self._documents.append(len(self._lengths))

    def close(self) -> None:
        """Put the finished pair in place."""
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        pointers = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1] * np.int64(self._dtype.itemsize), out=pointers[1:])
        header = _HEADER.pack(_MAGIC, _VERSION, self._code, len(lengths), len(self._documents))
        with idx_path(self._temporary).open("wb") as idx:
            idx.write(header)
            idx.write(lengths.astype("<i4").tobytes())
            idx.write(pointers.tobytes())
            idx.write(np.frombuffer(self._documents, np.int64).astype("<i8").tobytes())
            _sync(idx)
        _sync(self._bin)
        self._bin.close()
        bin_path(self._temporary).rename(bin_path(self._prefix))
        idx_path(self._temporary).rename(idx_path(self._prefix))
        sync_folder(self._prefix.parent)

    def abort(self) -> None:
        """Remove what was written."""
        self._bin.close()
        for path in (bin_path(self._temporary), idx_path(self._temporary)):
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


class IndexedReader:
    """A memory-mapped pair of files, checked when it is opened.

    Attributes:
        dtype: type of the stored tokens.
        lengths: int64 [num_documents], tokens of each document.

    Raises:
        CorpusError: a file is missing, truncated, of another format, or contradicts the other.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _read_index(idx_path(prefix))
        self.dtype = index.dtype
        self._starts = np.zeros(len(index.lengths) + 1, np.int64)
        np.cumsum(index.lengths, out=self._starts[1:])
        self._offsets: IntArray = self._starts[index.documents]
        self.lengths: IntArray = np.diff(self._offsets)
        self._firsts: IntArray = index.pointers // self.dtype.itemsize
        self._base = int(self._firsts[0]) if len(self._firsts) else 0
        # Nearly every file stores its sequences one behind the other; then a token's place in the
        # file is its place in the corpus plus a constant.
        self._joined = bool(np.array_equal(self._firsts, self._starts[:-1] + self._base))
        self._tokens = self._map(index)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self._starts[-1])

    def slice(self, document: int, start: int, stop: int) -> TokenArray:
        """Tokens `start` to `stop` of a document, without a copy where the file allows it."""
        assert 0 <= start <= stop <= self.lengths[document]
        offset = int(self._offsets[document])
        return self._read(offset + start, offset + stop)

    def gather(self, documents: IntArray, positions: IntArray) -> TokenArray:
        """Token `positions[k]` of document `documents[k]` for every k."""
        assert np.all((positions >= 0) & (positions < self.lengths[documents]))
        return self._at(self._offsets[documents] + positions)

    def scan(self) -> Iterator[TokenArray]:
        """All tokens in the order of the documents, a few MiB at a time."""
        for start in range(0, self.num_tokens, _SCAN_TOKENS):
            yield self._read(start, min(start + _SCAN_TOKENS, self.num_tokens))

    def document_at(self, token: int) -> int:
        """Find the document that holds the corpus's token number `token`."""
        return int(np.searchsorted(self._offsets, token, side="right")) - 1

    def _read(self, start: int, stop: int) -> TokenArray:
        if self._joined:
            return self._tokens[self._base + start : self._base + stop]
        return self._at(np.arange(start, stop))

    def _at(self, tokens: IntArray) -> TokenArray:
        if self._joined:
            return self._tokens[self._base + tokens]
        sequence = np.searchsorted(self._starts, tokens, side="right") - 1
        return self._tokens[self._firsts[sequence] + tokens - self._starts[sequence]]

    def _map(self, index: _Index) -> TokenArray:
        path = bin_path(self.prefix)
        size = _size(path)
        ends = index.pointers + index.lengths * np.int64(self.dtype.itemsize)
        expected = int(ends.max(initial=0))
        if size != expected:
            fault = "is truncated" if size < expected else "does not belong to its .idx"
            raise CorpusError(
                f"{path} {fault}: it has {size} bytes and {idx_path(self.prefix).name} describes "
                f"{expected}; copy or build the pair again"
            )
        if size == 0:
            return np.zeros(0, self.dtype)
        try:
            return np.memmap(path, self.dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror}") from None


class _Index:
    """The arrays of an `.idx` file."""

    def __init__(self, dtype: np.dtype[Any], raw: bytes | memoryview, counts: tuple[int, int]):
        num_sequences, num_entries = counts
        place = _HEADER.size
        self.dtype = dtype
        self.lengths = np.frombuffer(raw, "<i4", num_sequences, place)
        place += 4 * num_sequences
        self.pointers = np.frombuffer(raw, "<i8", num_sequences, place)
        place += 8 * num_sequences
        self.documents = np.frombuffer(raw, "<i8", num_entries, place)


def _read_index(path: Path) -> _Index:
    size = _size(path)
    try:
        raw = path.read_bytes() if size < _HEADER.size else np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None
    if bytes(raw[: len(_MAGIC)]) != _MAGIC:
        raise CorpusError(
            f"{path} is not an indexed token file: it begins with {bytes(raw[:9])!r}, "
            f"not {_MAGIC!r}"
        )
    if size < _HEADER.size:
        raise CorpusError(f"{path} is truncated: {size} bytes are less than its header")
    _, version, code, num_sequences, num_entries = _HEADER.unpack(raw[: _HEADER.size])
    if version != _VERSION:
        raise CorpusError(f"{path} has version {version}; only version {_VERSION} is known")
    if code not in _DTYPES or _DTYPES[code].kind == "f":
        allowed = ", ".join(f"{c} ({d.name})" for c, d in _DTYPES.items() if d.kind != "f")
        raise CorpusError(f"{path} has token type code {code}; allowed are {allowed}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
    if size == expected + num_sequences > expected:
        raise CorpusError(f"{path} holds a mode per sequence (multimodal); only text can be used")
    if size != expected:
        fault = "is truncated" if size < expected else "is damaged"
        raise CorpusError(
            f"{path} {fault}: {num_sequences} sequences and {num_entries} document entries take "
            f"{expected} bytes, it has {size}"
        )
    index = _Index(_DTYPES[code], raw, (num_sequences, num_entries))
    _check_index(index, path)
    return index


def _check_index(index: _Index, path: Path) -> None:
    documents = index.documents
    if len(documents) == 0 or documents[0] != 0 or np.any(np.diff(documents) < 0):
        raise CorpusError(f"{path} is damaged: its document index must start at 0 and ascend")
    if documents[-1] != len(index.lengths):
        raise CorpusError(
            f"{path} is damaged: its document index ends at {documents[-1]}, "
            f"but it has {len(index.lengths)} sequences"
        )
    if np.any(index.lengths < 0) or np.any(index.pointers < 0):
        raise CorpusError(f"{path} is damaged: it has a negative length or offset")
    if np.any(index.pointers % index.dtype.itemsize):
        raise CorpusError(
            f"{path} is damaged: an offset is no multiple of the {index.dtype.itemsize} bytes "
            f"of a token"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CorpusError(
            f"cannot read {path}: {error.strerror}; an indexed corpus is a pair .bin and .idx, "
            f"named without these endings"
        ) from None


def _sync(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())
