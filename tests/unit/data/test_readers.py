import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_attn.config import CorpusConfig
from dist_attn.data.readers import document_name, find_source
from dist_attn.errors import CorpusError


def texts(kind, path, **settings):
    source = find_source(CorpusConfig(kind=kind, path=str(path), **settings))
    return [r.text for r in source.records()]


def refusal(kind, path, **settings):
    with pytest.raises(CorpusError) as caught:
        texts(kind, path, **settings)
    return str(caught.value)


def write_lines(path, *lines):
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return path


def test_text_folder_is_sorted_and_exact(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes("é\r\n".encode())
    (tmp_path / "a.txt").write_bytes(b" one \n")
    (tmp_path / "c.md").write_bytes(b"not matched")
    assert texts("text", tmp_path) == [" one \n", "é\r\n"]
    assert texts("text", tmp_path, glob="*.md") == ["not matched"]
    assert texts("text", tmp_path / "c.md") == ["not matched"]


def test_text_complaints(tmp_path):
    assert "does not exist" in refusal("text", tmp_path / "missing")
    assert "no file that matches '**/*.txt'" in refusal("text", tmp_path)
    assert "glob '' cannot be used" in refusal("text", tmp_path, glob="")
    (tmp_path / "bad.txt").write_bytes(b"good\xffbad")
    message = refusal("text", tmp_path)
    assert "bad.txt is not valid UTF-8: byte 4 is 0xff" in message
    assert "iconv" in message


def test_stdlib_holds_source_files_only():
    source = find_source(CorpusConfig(kind="stdlib"))
    names = [p.as_posix() for p in source.files]
    assert any(name.endswith("json/decoder.py") for name in names)
    assert not any("site-packages" in name or "/test/" in name for name in names)
    assert list(source.files) == sorted(source.files)


def test_python_file_is_decoded_by_its_own_cookie(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    source = find_source(CorpusConfig(kind="stdlib"))
    assert [r.text for r in source.records()] == ["# coding: latin-1\n# é\n"]
    (tmp_path / "latin.py").write_bytes(b"# coding: nothing\n")
    with pytest.raises(CorpusError, match=r"latin\.py declares no usable encoding"):
        list(source.records())
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(CorpusError, match=r"latin\.py"):
        list(source.records())


def test_jsonl_rows_and_places(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "one"}, b"", {"text": "", "x": 1}, {"text": "é"}
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = find_source(CorpusConfig(kind="jsonl", path=str(tmp_path)))
    records = list(source.records())
    assert [(r.row, r.text) for r in records] == [(1, "one"), (3, ""), (4, "é")]
    assert records[-1].done_bytes == path.stat().st_size
    assert document_name("jsonl", str(path), 3) == f"{path} line 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 2 is not valid JSON"),
        (b'["x"]', "line 2 must hold a JSON object, got list"),
        (b'{"content": "x"}', "line 2 has no field 'text'; it has 'content'"),
        (b'{"text": 7}', "line 2: field 'text' must hold a string, got int"),
        (b'{"text": null}', "got null"),
        (b'{"text": "\\ud800"}', "line 2: character 0 is half a surrogate"),
        (b'{"text": "\xff"}', "line 2 is not valid UTF-8: byte 25 is 0xff"),
        (b"[" * 100_000, "line 2 is not valid JSON"),
    ],
)
def test_jsonl_complaints_name_the_line(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"text": "ok"}, line)
    complaint = refusal("jsonl", path)
    assert message in complaint
    assert str(path) in complaint


def test_jsonl_without_a_line(tmp_path):
    assert "a.jsonl is empty" in refusal("jsonl", write_lines(tmp_path / "a.jsonl", b"", b" "))


def test_parquet_row_groups(tmp_path):
    rows = [f"text {i}" for i in range(2500)]
    pq.write_table(
        pa.table({"id": range(2500), "body": rows}), tmp_path / "a.parquet", row_group_size=700
    )
    assert texts("parquet", tmp_path, field="body") == rows
    dictionary = pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()})
    pq.write_table(dictionary, tmp_path / "b.parquet")
    assert texts("parquet", tmp_path / "b.parquet") == ["x", "y", "x"]


def test_parquet_complaints(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "text": ["x"]}), path)
    assert "no column 'body'; it has 'n', 'text'" in refusal("parquet", path, field="body")
    assert "column 'n' must hold strings, it holds int64" in refusal("parquet", path, field="n")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert "row 2: column 'text' must hold a string, got null" in refusal("parquet", path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "a.parquet is empty" in refusal("parquet", path)
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": broken}), path)
    assert "row 1 is not valid UTF-8: byte 1 is 0xff" in refusal("parquet", path)
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path} cannot be read as Parquet" in refusal("parquet", path)
    path.write_bytes(b"")
    assert f"{path} cannot be read as Parquet" in refusal("parquet", path)
