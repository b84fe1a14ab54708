"""From files to tensors: the corpus, its batches, and each rank's share of a planned batch."""

from dist_attn.data.batch import (
    IGNORE_INDEX,
    LocalBatch,
    build_local_batch,
    join_batches,
    valid_tokens,
    valid_weight,
)
from dist_attn.data.corpus import Corpus, CorpusReport
from dist_attn.data.indexed import IndexedReader, IndexedWriter
from dist_attn.data.mixture import AnyCorpus, MixedCorpus, open_corpus
from dist_attn.data.sampler import BatchSampler, SamplerPosition

__all__ = [
    "IGNORE_INDEX",
    "AnyCorpus",
    "BatchSampler",
    "Corpus",
    "CorpusReport",
    "IndexedReader",
    "IndexedWriter",
    "LocalBatch",
    "MixedCorpus",
    "SamplerPosition",
    "build_local_batch",
    "join_batches",
    "open_corpus",
    "valid_tokens",
    "valid_weight",
]
