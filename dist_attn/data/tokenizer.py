"""Texts to token ids: plain bytes, or any Hugging Face `tokenizer.json`.

Both end every document with the end-of-document token, where there is one, and add nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from dist_attn.data.indexed import TokenArray
from dist_attn.errors import CorpusError


class Tokenizer(Protocol):
    """What turns texts into token ids."""

    #: One more than the largest id.
    vocab_size: int
    #: The id that ends every document, or None where the tokenizer names none.
    eos_id: int | None
    #: Changes whenever the ids of some text could.
    digest: str
    #: How messages call it.
    name: str

    def encode(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text; an empty array for an empty text, so that it can be left out."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 at the end of every document."""

    vocab_size = 257
    eos_id: int | None = 256
    digest = "bytes-eos256"
    name = "bytes"

    def encode(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> TokenArray:
        data = np.frombuffer(text.encode("utf-8"), np.uint8)
        ids = np.empty(data.size + 1 if data.size else 0, np.uint16)
        ids[: data.size] = data
        ids[data.size :] = 256
        return ids


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without its templates, truncation and padding.

    The token that ends a document is the `eos_token` of the tokenizer_config.json that lies beside
    the file; without that, documents end without a token of their own.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CorpusError(
                f"cannot read the tokenizer {path}: {error.strerror}; data.tokenizer takes 'bytes' "
                f"or the path of a tokenizer.json"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:
            # The library raises plain Exception for any content that it does not understand.
            raise CorpusError(f"{path} is not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise CorpusError(f"{path} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        eos = _eos_token(path.with_name("tokenizer_config.json"))
        if eos is not None and eos not in vocabulary:
            raise CorpusError(
                f"the eos_token {eos!r} of {path.with_name('tokenizer_config.json')} is not in the "
                f"vocabulary of {path}"
            )
        self.eos_id: int | None = None if eos is None else vocabulary[eos]
        self.digest = hashlib.sha256(content + repr(eos).encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[TokenArray]:
        """Token ids of each text."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            raise CorpusError(f"{self.name} cannot encode a text: {error}") from None
        tail = [] if self.eos_id is None else [self.eos_id]
        return [np.array(e.ids + tail if e.ids else [], np.int64) for e in encodings]


def load_tokenizer(setting: str) -> Tokenizer:
    """Load the tokenizer that `data.tokenizer` names."""
    if setting == "bytes":
        return ByteTokenizer()
    return HuggingFaceTokenizer(Path(setting).expanduser())


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Choose the narrowest type of indexed files that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


def _eos_token(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot read {path}: {error}") from None
    token = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise CorpusError(f"{path}: eos_token must be a string, got {token!r}")
    return token
