import gzip
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ossature.data.sources import Part, Source, cut, documents, find

TEXTS = ["one", "zwei\nzwei", "", "три 🙂", "<|end|>", "x" * 400]
LINES = "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)).encode()


def read(*inputs, text_key: str = "text") -> list[str]:
    parts = cut(find([str(name) for name in inputs]).sources)
    return [text for part in parts for text in documents(part, text_key)]


def packed_zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(raw)


def arrow_table(path):
    table = pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\r\n").rstrip()),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:90]) + gzip.compress(LINES[90:])),
        ("a.jsonl.zst", packed_zst(LINES)),
        ("a.jsonl.zst", packed_zst(LINES[:90]) + packed_zst(LINES[90:])),
    ],
)
def test_every_line_is_a_document(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)

    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\n\n"])
def test_wherever_a_file_is_cut_no_line_is_lost_or_read_twice(tmp_path, ends):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.replace(b"\n", ends))
    size = path.stat().st_size
    source = Source(str(path), "jsonl", size, 0)

    for cut_at in range(1, size):
        halves = [Part((source,), 0, cut_at), Part((source,), cut_at, size)]
        assert [text for half in halves for text in documents(half, "text")] == TEXTS


def test_a_column_of_parquet_is_read(tmp_path):
    table = pa.table({"id": range(6), "content": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pq.write_table(
        table.set_column(1, "content", table["content"].dictionary_encode()),
        tmp_path / "b.parquet",
    )

    assert read(tmp_path, text_key="content") == 2 * TEXTS
    source = find([str(tmp_path / "a.parquet")]).sources[0]
    assert list(documents(Part((source,), 1, 3), "content")) == TEXTS[2:]


def test_a_hugging_face_data_set_is_read_from_its_arrow_files(tmp_path, monkeypatch):
    arrow_table(tmp_path / "shard.arrow")
    asked = []

    class Dataset:
        cache_files = ({"filename": str(tmp_path / "shard.arrow")},)

    def load_dataset(*words, split):
        asked.append((*words, split))
        return Dataset()

    library = SimpleNamespace(load_dataset=load_dataset, Dataset=Dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)  # the hub is not asked in tests

    assert read("owner/name") == TEXTS
    assert read("owner/name:small:validation") == TEXTS
    assert asked == [("owner/name", "train"), ("owner/name", "small", "validation")]
    source = find(["owner/name:test"]).sources[0]
    assert list(documents(Part((source,), 1, 3), "text")) == TEXTS[2:]
    with pytest.raises(ValueError, match="a slice of a split"):
        find(["owner/name:train[:10]"])


def test_a_folder_is_read_by_path_and_says_what_it_left_out(tmp_path):
    for name in ("b.txt", "a/z.md", "a.py", ".hidden.txt", "a/photo.png", "c.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        raw = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    found = find([str(tmp_path)])

    assert read(tmp_path) == ["a/z.md", "a.py", "b.txt", "c.txt.gz"]
    assert found.ignored == [str(tmp_path / "a/photo.png")]
    assert read(tmp_path / "a/photo.png") == ["a/photo.png"]  # named itself, it is text


def test_the_standard_library_is_files_that_import_without_tests():
    first, second = find(["python-stdlib"]).sources, find(["python-stdlib"]).sources
    names = [source.path for source in first]

    assert first == second
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    assert sum(source.size_bytes for source in first) > 5e6
    assert names != sorted(names)
    (decoder,) = read(next(name for name in names if name.endswith("/json/decoder.py")))
    assert "class JSONDecoder" in decoder


def test_parts_are_all_of_the_input_in_order(tmp_path):
    sources = [Source(f"{n}.txt", "text", 200_000, 0) for n in range(9)]
    (tmp_path / "a.jsonl").write_bytes(b" " * 1_500_000)
    parts = cut([*sources, *find([str(tmp_path / "a.jsonl")]).sources, *sources[:2]])

    assert [len(part.sources) for part in parts] == [3, 3, 3, 1, 1, 1, 2]
    assert [(part.start, part.stop) for part in parts[3:6]] == [
        (0, 2**19), (2**19, 2**20), (2**20, 1_500_000),
    ]  # fmt: skip


BAD = [
    ("a.txt", b"fine\nna\xefve\n", r"a\.txt: line 2: not UTF-8: byte 0xef"),
    ("a.jsonl", LINES + b'{"text": "na\xefve"}\n', r"a\.jsonl: line 7: not UTF-8: byte 0xef"),
    ("a.jsonl", LINES + b'{"text": \n', r"a\.jsonl: line 7: not JSON: .* column \d"),
    ("a.jsonl", LINES + b"[1]\n", r"line 7: no key 'text' \(--text-key\): it is no object"),
    ("a.jsonl", LINES + b'{"body": "x"}\n', r"line 7: no key 'text' .*: it has body"),
    ("a.jsonl", LINES + b'{"text": 5}\n', r"line 7: 'text' must be a text, not int"),
    ("a.jsonl", LINES + b'{"text": "\\ud800"}\n', r"line 7: 'text' has half of a surrogate"),
    ("a.jsonl.gz", gzip.compress(LINES + b"{}\n"), r"a\.jsonl\.gz: line 7: no key 'text'"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz: truncated or damaged"),
    ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: truncated or damaged"),
    ("a.jsonl.zst", packed_zst(LINES)[:-20], r"a\.jsonl\.zst: truncated"),
    ("a.jsonl.zst", LINES, r"a\.jsonl\.zst: damaged"),
    ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole Parquet file"),
]


@pytest.mark.parametrize(("name", "raw", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_with_its_file(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)

    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_bad_line_is_counted_from_the_start_of_a_file_that_was_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b"{}\n")
    source = Source(str(path), "jsonl", path.stat().st_size, 0)

    with pytest.raises(ValueError, match=r"a\.jsonl: line 7: no key"):
        list(documents(Part((source,), len(LINES) - 50, path.stat().st_size), "text"))


def test_a_bad_column_is_named_with_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None], "id": [1, 2]}), path)

    with pytest.raises(ValueError, match=r"a\.parquet: no column 'body' .*: it has text, id"):
        read(path, text_key="body")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'id' must be text, not int64"):
        read(path, text_key="id")
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: column 'text' is null"):
        read(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing/file.txt", "/missing"])
def test_an_input_that_is_not_there_is_an_error(name):
    with pytest.raises(ValueError, match="no such file or folder"):
        find([name])
