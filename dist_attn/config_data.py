"""The part of the configuration that says what is trained on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dist_attn.config_section import Positive, PositiveFloat, Section


class CorpusConfig(Section):
    """Where the documents come from."""

    #: stdlib: Python's own source files. text: a folder, one document per file. jsonl and parquet:
    #: one document per row. megatron: an indexed .bin/.idx pair that is tokenised already.
    kind: Literal["stdlib", "text", "jsonl", "parquet", "megatron"] = "stdlib"
    #: File or folder; for megatron the prefix without .bin or .idx. Not used by stdlib.
    path: str | None = None
    #: File names of a text folder.
    glob: str = "**/*.txt"
    #: Field of a JSONL row, or column of a Parquet file, that holds the text.
    field: str = "text"

    @model_validator(mode="after")
    def _path(self) -> CorpusConfig:
        if (self.path is None) != (self.kind == "stdlib"):
            need = "takes no path" if self.kind == "stdlib" else "needs a path"
            raise ValueError(f"kind '{self.kind}' {need}, got path={self.path!r}")
        return self


class SourceConfig(Section):
    """A corpus among several."""

    name: str
    corpus: CorpusConfig
    #: By which the losses of this source's tokens count. The step's loss is the weighted mean.
    loss_weight: PositiveFloat = 1.0


class BatchConfig(Section):
    """The size of a global batch; exactly one of the two."""

    documents: Positive | None = None
    #: Documents are taken in order until the next one would pass this many tokens.
    tokens: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> BatchConfig:
        if (self.documents is None) == (self.tokens is None):
            raise ValueError("give exactly one of `documents` and `tokens`")
        return self


class DataConfig(Section):
    """The corpus, its tokens, and what makes a global batch."""

    corpus: CorpusConfig = CorpusConfig()
    #: Several corpora instead of `corpus`; their documents are shuffled together.
    sources: list[SourceConfig] = []
    #: `bytes`, or the path of a Hugging Face tokenizer.json.
    tokenizer: str = "bytes"
    max_document_tokens: Positive = 8192
    #: What happens to a longer document: stop, cut it into several documents, or leave it out.
    overlong: Literal["refuse", "split", "drop"] = "refuse"
    batch: BatchConfig = BatchConfig(tokens=16384)
    shuffle: bool = True
    #: Where tokenised corpora are kept; by default a folder beside the run folder.
    cache_dir: str | None = None
    #: Local tokens are padded up to a multiple of this.
    pad_to_multiple: Positive = 1

    @model_validator(mode="after")
    def _sources(self) -> DataConfig:
        names = [s.name for s in self.sources]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"two sources are called {', '.join(twice)}; give each its own name")
        if self.sources and "corpus" in self.model_fields_set and self.corpus != CorpusConfig():
            raise ValueError("give `corpus` or `sources`, not both")
        return self
