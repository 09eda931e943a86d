"""Our reader and writer of safetensors against the library, and against every damaged file."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ossature.checkpoint import safetensors
from ossature.checkpoint.safetensors import INDEX, Reader, Spec, Writer, read_header


def random_tensors() -> dict[str, Tensor]:
    """Names out of order, dtypes of every width, a scalar and an empty tensor."""
    return {
        "b.weight": torch.randn(5, 3),
        "a.blocks": torch.randint(0, 256, (7, 2, 16), dtype=torch.uint8),
        "z": torch.randn(4, 6).bfloat16(),
        "c": torch.randint(-9, 9, (3,)),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False, True]),
    }


def specs(tensors: dict[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], **options) -> None:
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, specs(tensors), **options)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def read(folder: Path) -> dict[str, Tensor]:
    reader = Reader(folder)
    tensors = {name: reader.read(name) for name in reader.places}
    reader.close()
    return tensors


def test_reads_what_the_library_wrote(tmp_path: Path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    assert_same(read(tmp_path), tensors)


def test_the_library_reads_what_we_wrote(tmp_path: Path):
    tensors = random_tensors()
    write(tmp_path, tensors)

    assert_same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_is_the_librarys_byte_for_byte(tmp_path: Path):
    kinds = (torch.float32, torch.bfloat16, torch.uint8)  # what checkpoints consist of
    tensors = {n: t for n, t in random_tensors().items() if t.dtype in kinds and t.numel()}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})

    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_rows_can_be_read_and_written_in_any_order(tmp_path: Path):
    tensors = {"x": torch.randn(7, 3), "y": torch.randn(5).bfloat16()}
    writer = Writer(tmp_path, specs(tensors))
    writer.write("x", tensors["x"][4:], start=4)
    writer.write("y", tensors["y"])
    writer.write("x", tensors["x"][:4])
    writer.finish()
    reader = Reader(tmp_path)

    assert torch.equal(reader.read("x", 2, 6), tensors["x"][2:6])
    assert torch.equal(reader.read("y", 1), tensors["y"][1:])
    assert reader.read("x", 3, 3).shape == (0, 3)


def test_views_are_written_in_their_own_order(tmp_path: Path):
    x = torch.randn(6, 4)
    write(tmp_path, {"x": x.T})

    assert torch.equal(read(tmp_path)["x"], x.T)


def test_a_tensor_that_was_not_written_whole_is_noticed(tmp_path: Path):
    writer = Writer(tmp_path, {"x": Spec(torch.float32, (4, 2))})
    writer.write("x", torch.zeros(3, 2))

    with pytest.raises(AssertionError, match="x: 8 bytes were not written"):
        writer.finish()


def test_files_are_filled_up_to_the_limit_in_the_order_given(tmp_path: Path):
    tensors = {name: torch.randn(10) for name in "dacbe"}  # 40 bytes each
    write(tmp_path, tensors, max_shard_bytes=80)
    index = json.loads((tmp_path / INDEX).read_text())

    assert index["metadata"]["total_size"] == 200
    one, two, three = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    assert index["weight_map"] == {"d": one, "a": one, "c": two, "b": two, "e": three}
    assert list(load_file(tmp_path / two)) == ["b", "c"]
    assert_same(read(tmp_path), tensors)


def test_a_tensor_larger_than_a_file_has_one_to_itself(tmp_path: Path):
    write(tmp_path, {n: torch.zeros(s) for n, s in [("a", 2), ("b", 100), ("c", 2)]},
          max_shard_bytes=16)  # fmt: skip

    assert [len(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]


def test_many_shards_without_an_index_are_read_together(tmp_path: Path):
    tensors = random_tensors()
    write(tmp_path, tensors, max_shard_bytes=70)
    (tmp_path / INDEX).unlink()

    assert_same(read(tmp_path), tensors)


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = Writer(tmp_path, {"x": Spec(torch.float32, (4,))})
    monkeypatch.setattr(safetensors.os, "pwrite", full)

    with pytest.raises(OSError, match="No space left"):
        writer.write("x", torch.zeros(4))
    writer.close()


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch):
    """The system may do part of what it is asked, and does beyond 2 GiB."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(safetensors.os, "pwrite", lambda h, d, o: pwrite(h, d[:5], o))
    monkeypatch.setattr(safetensors.os, "preadv", lambda h, b, o: preadv(h, [b[0][:3]], o))
    tensors = random_tensors()
    write(tmp_path, tensors)

    assert_same(read(tmp_path), tensors)


# What can be wrong with a file.


def raw(header: object, data: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def entry(start: int, stop: int, shape: list | None = None, dtype: object = "U8") -> dict:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED = {
    "empty file": (b"", "cut short or not a safetensors file: 0 bytes"),
    "cut within the header": (raw({"x": entry(0, 4)}, 0)[:20], "cut short or not a safetensors"),
    "cut within the data": (raw({"x": entry(0, 4)}, 3), "cut short: 71 bytes, .* describes 72"),
    "bytes left over": (raw({"x": entry(0, 4)}, 5), "too long"),
    "a huge header": (raw(b"{}", 0, 2**40), "cut short or not a safetensors file"),
    "no JSON": (raw(b"{oops", 0), "not valid JSON"),
    "no object": (raw([1], 0), "not a JSON object"),
    "a name twice": (raw(b'{"x":{},"x":{}}', 0), "x is there twice"),
    "an unknown dtype": (raw({"x": entry(0, 4, dtype="F4")}, 4), "x has the unknown dtype 'F4'"),
    "a dtype of no text": (raw({"x": entry(0, 4, dtype=[])}, 4), "x has the unknown dtype"),
    "a key missing": (raw({"x": {"dtype": "U8"}}, 0), "x lacks dtype, shape or data_offsets"),
    "a negative size": (raw({"x": entry(0, 4, [-4])}, 4), "x has a shape or data_offsets"),
    "no list of sizes": (raw({"x": entry(0, 4, "4")}, 4), "x has a shape or data_offsets"),  # type: ignore[arg-type]
    "a wrong size": (raw({"x": entry(0, 4, [3])}, 4), r"x has 4 bytes, U8 \[3\] takes 3"),
    "overlap": (raw({"x": entry(0, 4), "y": entry(2, 6)}, 6), "bytes of y overlap those of x"),
    "a gap": (raw({"x": entry(0, 4), "y": entry(5, 6)}, 6), "bytes of y leave a gap after .* x"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(damage: str, tmp_path: Path):
    content, message = DAMAGED[damage]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)

    with pytest.raises(ValueError, match=message) as error:
        Reader(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_a_file_cut_short_after_it_was_opened_is_noticed(tmp_path: Path):
    write(tmp_path, {"x": torch.zeros(1000)})
    reader = Reader(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)

    with pytest.raises(ValueError, match="x: the file was cut short while it was read"):
        reader.read("x")


def sharded(folder: Path) -> tuple[Path, dict]:
    """Two files, a and b in the first, c in the second; the index and its content."""
    write(folder, {name: torch.randn(10) for name in "abc"}, max_shard_bytes=80)
    return folder / INDEX, json.loads((folder / INDEX).read_text())


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("outside", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", ".."])
def test_an_index_may_not_point_outside_its_folder(outside: str, tmp_path: Path):
    index, table = sharded(tmp_path)
    table["weight_map"]["b"] = outside
    index.write_text(json.dumps(table))

    with pytest.raises(ValueError, match=r"index\.json: b lies outside the folder: "):
        Reader(tmp_path)


def test_a_missing_shard_is_named_with_a_tensor_in_it(tmp_path: Path):
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()

    with pytest.raises(ValueError, match=rf"{SECOND}: missing; .* places c there"):
        Reader(tmp_path)


def test_index_and_files_must_agree(tmp_path: Path):
    index, table = sharded(tmp_path)

    def message(**changes: str | None) -> str:
        weight_map = {**table["weight_map"], **changes}
        weight_map = {name: file for name, file in weight_map.items() if file}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError) as error:
            Reader(tmp_path)
        return str(error.value)

    assert message(a=SECOND).endswith(f"{SECOND}: has no a; {INDEX} places it there")
    assert message(b=None).endswith(f"{FIRST}: b is not in {INDEX}")
    assert message(d=FIRST).endswith(f"{FIRST}: has no d; {INDEX} places it there")


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path):
    index, _ = sharded(tmp_path)
    save_file({"c": torch.zeros(10), "a": torch.zeros(2)}, tmp_path / SECOND)
    with pytest.raises(ValueError, match=f"{SECOND}: a is also in {FIRST}"):
        Reader(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=f"{SECOND}: a is also in {FIRST}"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "a: 3 is not the name of a file"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "a is there twice"),
    ],
)
def test_a_damaged_index_is_one_line(text: str, message: str, tmp_path: Path):
    index, _ = sharded(tmp_path)
    index.write_text(text)

    with pytest.raises(ValueError, match=message):
        Reader(tmp_path)


def test_a_single_file_beside_an_index_of_others_is_not_chosen_between(tmp_path: Path):
    sharded(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")

    with pytest.raises(ValueError, match=r"has both model\.safetensors and"):
        Reader(tmp_path)


def test_a_folder_without_safetensors_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no safetensors file"):
        Reader(tmp_path)


def test_a_header_alone_is_read(tmp_path: Path):
    write(tmp_path, {"x": torch.zeros(3, 2, dtype=torch.bfloat16)})

    assert read_header(tmp_path / "model.safetensors")["x"].spec == Spec(torch.bfloat16, (3, 2))


def test_what_is_settled_on_the_disk_meanwhile_is_all_there(tmp_path: Path, monkeypatch):
    """Synced and forgotten every few bytes, and read by a reader that forgets too."""
    settled: list[int] = []
    fsync = os.fsync

    def count(handle: int) -> None:
        settled.append(handle)
        fsync(handle)

    monkeypatch.setattr(safetensors, "SYNC_BYTES", 100)
    monkeypatch.setattr(safetensors.os, "fsync", count)
    tensors = {name: torch.randn(10) for name in "abcdefgh"}
    write(tmp_path, tensors, max_shard_bytes=160)
    reader = Reader(tmp_path)
    reader.once = True

    assert_same({name: reader.read(name) for name in reader.places}, tensors)
    assert len(settled) >= 4  # two files: each when it is full, and in between


def test_a_sync_that_fails_in_the_background_is_an_error_of_the_writer(tmp_path, monkeypatch):
    def fail(_handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(safetensors.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, {"x": torch.zeros(4)})
