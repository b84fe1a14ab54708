import struct

import numpy as np
import pytest

from dist_attn.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path
from dist_attn.errors import CorpusError

# Written by megatron-core 0.16.1's IndexedDatasetBuilder with dtype uint16:
# add_document([1, 2, 3, 300, 5], lengths [2, 3]), then add_document([7], [1]).
MEGATRON_BIN = bytes.fromhex("0100020003002c0105000700")
MEGATRON_IDX = bytes.fromhex(
    "4d4d4944494458000001000000000000000803000000000000000300000000000000"
    "020000000300000001000000"
    "000000000000000004000000000000000a00000000000000"
    "000000000000000002000000000000000300000000000000"
)


@pytest.fixture
def prefix(tmp_path):
    path = tmp_path / "corpus"
    bin_path(path).write_bytes(MEGATRON_BIN)
    idx_path(path).write_bytes(MEGATRON_IDX)
    return path


def patched_idx(prefix, offset, data):
    content = bytearray(MEGATRON_IDX)
    content[offset : offset + len(data)] = data
    idx_path(prefix).write_bytes(content)


def test_reads_what_megatron_wrote(prefix):
    reader = IndexedReader(prefix)
    assert reader.lengths.tolist() == [5, 1]
    assert reader.slice(0, 1, 4).tolist() == [2, 3, 300]
    assert reader.slice(1, 0, 1).tolist() == [7]


def test_writes_what_megatron_writes(tmp_path):
    path = tmp_path / "ours"
    with IndexedWriter(path, np.uint16) as writer:
        writer.add_document([1, 2, 3, 300, 5], [2, 3])
        writer.add_document([7])
    assert bin_path(path).read_bytes() == MEGATRON_BIN
    assert idx_path(path).read_bytes() == MEGATRON_IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_round_trip_with_empty_documents(tmp_path, dtype):
    limits = np.iinfo(dtype)
    documents = [[], [limits.min, 3, limits.max], [], [5], []]
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
    reader = IndexedReader(tmp_path / "x")
    assert reader.dtype == np.dtype(dtype)
    read = [reader.slice(i, 0, int(n)).tolist() for i, n in enumerate(reader.lengths)]
    assert read == documents
    assert np.concatenate(list(reader.scan())).tolist() == [limits.min, 3, limits.max, 5]
    assert [reader.document_at(t) for t in range(4)] == [1, 1, 1, 3]


def test_sequences_stored_out_of_order_are_joined(prefix):
    # The document [7], [300, 5] then [1, 2, 3]: lengths 1, 2, 3 at bytes 10, 6, 0.
    patched_idx(prefix, 34, struct.pack("<3i3q3q", 1, 2, 3, 10, 6, 0, 0, 2, 3))
    reader = IndexedReader(prefix)
    assert reader.lengths.tolist() == [3, 3]
    assert reader.slice(0, 0, 3).tolist() == [7, 300, 5]
    assert reader.slice(1, 1, 3).tolist() == [2, 3]
    picked = reader.gather(np.array([1, 0, 0, 1]), np.array([0, 2, 0, 2]))
    assert picked.tolist() == [1, 5, 7, 3]
    assert np.concatenate(list(reader.scan())).tolist() == [7, 300, 5, 1, 2, 3]


def test_no_document(tmp_path):
    with IndexedWriter(tmp_path / "x", np.int32):
        pass
    reader = IndexedReader(tmp_path / "x")
    assert len(reader) == 0
    assert list(reader.scan()) == []


def test_failed_writing_leaves_nothing(tmp_path):
    def write():
        with IndexedWriter(tmp_path / "x", np.uint8) as writer:
            writer.add_document([1, 2])
            writer.add_document([256])

    with pytest.raises(CorpusError, match="256 do not fit uint8"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_written_over(prefix):
    with pytest.raises(CorpusError, match="not written over"):
        IndexedWriter(prefix, np.uint16)
    assert bin_path(prefix).read_bytes() == MEGATRON_BIN


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"PK", "not an indexed token file"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x07", "code 7"),
        (17, b"\x09", "code 9"),
        (18, struct.pack("<Q", 2**62), "truncated"),
        (18, struct.pack("<Q", 1), "damaged: 1 sequences"),
        (34, struct.pack("<i", -2), "negative"),
        (46, struct.pack("<q", 1), "no multiple"),
        (70, struct.pack("<q", 1), "start at 0"),
        (78, struct.pack("<q", 9), "ascend"),
        (86, struct.pack("<q", 2), "ends at 2"),
        (54, struct.pack("<q", 8), "corpus.bin"),
    ],
)
def test_damaged_index(prefix, offset, data, message):
    patched_idx(prefix, offset, data)
    if message == "corpus.bin":
        # The second sequence still lies inside the file, so this one alone is no fault ...
        bin_path(prefix).write_bytes(MEGATRON_BIN + bytes(2))
        IndexedReader(prefix)
        bin_path(prefix).write_bytes(MEGATRON_BIN)  # ... but here it reaches past the end.
    with pytest.raises(CorpusError, match=message) as caught:
        IndexedReader(prefix)
    assert str(prefix) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 33, 34, 60, len(MEGATRON_IDX) - 1])
def test_truncated_index(prefix, kept):
    idx_path(prefix).write_bytes(MEGATRON_IDX[:kept])
    with pytest.raises(CorpusError, match=r"corpus\.idx"):
        IndexedReader(prefix)


def test_file_of_tokens_that_does_not_fit(prefix):
    bin_path(prefix).write_bytes(MEGATRON_BIN[:-1])
    with pytest.raises(CorpusError, match=r"corpus\.bin is truncated: it has 11 bytes"):
        IndexedReader(prefix)
    bin_path(prefix).write_bytes(MEGATRON_BIN + b"x")
    with pytest.raises(CorpusError, match=r"corpus\.bin does not belong"):
        IndexedReader(prefix)
    bin_path(prefix).unlink()
    with pytest.raises(CorpusError, match=r"corpus\.bin: No such file"):
        IndexedReader(prefix)


def test_multimodal_index_is_refused(prefix):
    idx_path(prefix).write_bytes(MEGATRON_IDX + bytes(3))
    with pytest.raises(CorpusError, match="multimodal"):
        IndexedReader(prefix)
