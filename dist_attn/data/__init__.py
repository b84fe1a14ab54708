"""From files to tensors: the corpus, its batches, and each rank's share of a planned batch."""

from dist_attn.data.batch import (
    IGNORE_INDEX,
    LocalBatch,
    build_local_batch,
    join_batches,
    valid_tokens,
)
from dist_attn.data.corpus import Corpus, CorpusReport, open_corpus
from dist_attn.data.indexed import IndexedReader, IndexedWriter
from dist_attn.data.sampler import BatchSampler, SamplerPosition

__all__ = [
    "IGNORE_INDEX",
    "BatchSampler",
    "Corpus",
    "CorpusReport",
    "IndexedReader",
    "IndexedWriter",
    "LocalBatch",
    "SamplerPosition",
    "build_local_batch",
    "join_batches",
    "open_corpus",
    "valid_tokens",
]
