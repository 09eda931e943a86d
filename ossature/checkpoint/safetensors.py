"""Folders of safetensors files, read and written piece by piece.

The `safetensors` library maps a file into memory, where pages read count as this process's own,
and writes tensors it holds whole.  Here a tensor is read by rows into a buffer of its own and
written by rows at its place: what is held at a time is the caller's choice, whatever the size of
the model.  The format is the library's: 8 bytes of length, a JSON header, the tensors' bytes
without gaps.

Every mistake in a file is a ValueError of one line that names the file and the tensor.

Source: the format section of huggingface/safetensors' README; shards and index as written by
transformers' `save_pretrained`.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ossature.checkpoint.box import Box, bytes_of, read_box, rows

FORMAT_PT = {"format": "pt"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
SYNC_BYTES = 2**28
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor is, without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    """Bytes from the start of the file."""
    spec: Spec


class Reader:
    """The tensors of a folder; reads whole tensors or rows of them, from any thread.

    Which files count: those named by `model.safetensors.index.json` if there is one, else
    `model.safetensors`, else every `*.safetensors`.

    Raises:
        ValueError: a file or the index is damaged, or they contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = _index(folder)
        self.once = False
        """Nothing is read twice: let the page cache forget it at once."""
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first dim of a tensor; all of it by default."""
        return self.box(name, rows(self.places[name].spec.shape, start, stop))

    def box(self, name: str, box: Box) -> Tensor:
        """A range of every dim of a tensor; no other bytes are read."""
        file, offset, (dtype, shape) = self.places[name]
        handle = self._handle(file)
        out = read_box(handle, offset, dtype, shape, box, f"{file}: {name}")
        if self.once and shape:
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            first, last = box[0].start * row_bytes, box[0].stop * row_bytes
            _forget(handle, offset + first, last - first)
        return out

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]


def read_header(path: Path) -> dict[str, Place]:
    """The tensors of one file.

    Raises:
        ValueError: the file is cut short or is no safetensors file, a tensor is there twice, has
            an unknown dtype, or bytes that overlap another's, leave a gap or do not fit its shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise ValueError(
                f"{path}: cut short or not a safetensors file: {size} bytes do not hold its header"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file: a header of {length} bytes")
        table = json_object(path, file.read(length))
    table.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length) for name, entry in table.items()}
    end, before = 8 + length, "the header"
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[0])):
        if place.offset != end:
            what = "overlap" if place.offset < end else "leave a gap after"
            raise ValueError(f"{path}: the bytes of {name} {what} those of {before}")
        end, before = end + place.spec.num_bytes, name
    if end != size:
        what = "cut short" if size < end else "too long"
        raise ValueError(f"{path}: {what}: {size} bytes, its header describes {end}")
    return places


def _index(folder: Path) -> dict[str, Place]:
    index = folder / INDEX
    if index.is_file():
        if (folder / SINGLE).is_file() and SINGLE not in _weight_map(index).values():
            raise ValueError(f"{folder}: has both {SINGLE} and {INDEX}, which does not name it")
        return _read_indexed(index)
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: holds no safetensors file")
    places: dict[str, Place] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise ValueError(f"{file}: {name} is also in {places[name].file.name}")
            places[name] = place
    return places


def _read_indexed(index: Path) -> dict[str, Place]:
    """The tensors an index names, each looked up in the file it names."""
    weight_map = _weight_map(index)
    headers: dict[str, dict[str, Place]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(f"{index}: {name} lies outside the folder: {file}")
        path = index.parent / file
        if file not in headers:
            if not path.is_file():
                raise ValueError(f"{path}: missing; {index.name} places {name} there")
            headers[file] = read_header(path)
        if name not in headers[file]:
            raise ValueError(f"{path}: has no {name}; {index.name} places it there")
    for file, header in headers.items():
        for name in header:
            if name not in weight_map:
                raise ValueError(f"{index.parent / file}: {name} is not in {index.name}")
            if weight_map[name] != file:
                other = weight_map[name]
                raise ValueError(f"{index.parent / file}: {name} is also in {other}")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ValueError(f"{index}: {name}: {file!r} is not the name of a file")
    return weight_map


def json_object(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object none of whose keys is there twice.

    Args:
        path: where the text comes from, for the sentence of an error.
    """
    seen_twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            seen_twice.append(next(key for key in keys if keys.count(key) > 1))
        return table

    try:
        table = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, or a number of too many digits too
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if seen_twice:
        raise ValueError(f"{path}: {seen_twice[0]} is there twice")
    if not isinstance(table, dict):
        raise ValueError(f"{path}: not a JSON object")
    return table


def _place(path: Path, name: str, entry: Any, data: int) -> Place:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: {name} lacks dtype, shape or data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in DTYPES:
        raise ValueError(f"{path}: {name} has the unknown dtype {word!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name} has a shape or data_offsets that are no list of sizes")
    spec = Spec(DTYPES[word], tuple(shape))
    if offsets[1] - offsets[0] != spec.num_bytes:
        raise ValueError(
            f"{path}: {name} has {offsets[1] - offsets[0]} bytes, "
            f"{word} {shape} takes {spec.num_bytes}"
        )
    return Place(path, data + offsets[0], spec)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def shard_name(number: int, count: int) -> str:
    """Files are numbered from 1 and "of" is how many there are, as transformers writes them."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class Writer:
    """Writes tensors to a folder, rows at a time and in any order, each at its place.

    Tensors are dealt to files in the order given: a new file begins when the next tensor would
    take the bytes in it beyond `max_shard_bytes`.  One file is `model.safetensors`; of more there
    is an index.  Within a file the wider dtype comes first, then the name.

    What is written goes to the disk in the background, SYNC_BYTES at a time, and out of the page
    cache.  Not atomic: write to a folder beside the final one, then rename.

    Args:
        name_of: (number from 0, count) -> the name of a file, when there are several.
        metadata: for the header of every file; transformers asks for this one.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, Spec],
        max_shard_bytes: int = 5_000_000_000,
        name_of: Callable[[int, int], str] = shard_name,
        metadata: Mapping[str, str] | None = FORMAT_PT,
    ) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._handles: dict[Path, int] = {}
        self._left: dict[Path, int] = {}
        self._missing = {name: spec.num_bytes for name, spec in specs.items()}
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._syncing: deque[Future[None]] = deque()
        self._unsynced = 0
        shards = deal(specs, max_shard_bytes)
        for number, names in enumerate(shards):
            file = SINGLE if len(shards) == 1 else name_of(number, len(shards))
            dealt = {name: specs[name] for name in names}
            header, places = _header(folder / file, dealt, metadata)
            self.places |= places
            handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self._handles[folder / file] = handle
            write_at(handle, memoryview(header), 0)
            self._left[folder / file] = sum(specs[name].num_bytes for name in names)
        if len(shards) > 1:
            total = sum(self._left.values())
            weight_map = {name: self.places[name].file.name for name in specs}
            table = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write rows of a tensor, from row `start` of its first dim on.

        Raises:
            OSError: the disk is full, or the like.
        """
        file, offset, (dtype, shape) = self.places[name]
        rows = tensor.shape[0] if tensor.shape else 1
        assert tensor.dtype == dtype and tensor.shape[1:] == shape[1:], name
        assert start + rows <= (shape[0] if shape else 1), name
        data = bytes_of(tensor)
        write_at(self._handles[file], data, offset + start * (len(data) // max(rows, 1)))
        self._missing[name] -= len(data)
        self._left[file] -= len(data)
        self._unsynced += len(data)
        if not self._left[file]:
            self._syncing.append(self._sync.submit(os.fsync, self._handles[file]))
        elif self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._syncing.append(self._sync.submit(settle, self._handles[file]))
        while len(self._syncing) > 2:  # a disk that is slower than we are sets the pace
            self._syncing.popleft().result()

    def finish(self) -> None:
        """Wait until all tensors are on the disk."""
        for name, left in self._missing.items():
            assert left == 0, f"{name}: {left} bytes were not written"
        for syncing in self._syncing:
            syncing.result()
        self.close()

    def close(self) -> None:
        """Give up: close the files, whatever is in them."""
        self._sync.shutdown(wait=True, cancel_futures=True)
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def deal(specs: Mapping[str, Spec], max_bytes: int) -> list[list[str]]:
    """Names for each file, in the order given; a tensor larger than a file has one to itself."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        if shards[-1] and held + spec.num_bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += spec.num_bytes
    return shards


def _header(
    file: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Place]]:
    """The bytes before the data, and where each tensor's data will lie."""
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        spec = specs[name]
        offsets = [end, end + spec.num_bytes]
        table[name] = {"dtype": _WORDS[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    places = {
        name: Place(file, data + table[name]["data_offsets"][0], specs[name]) for name in order
    }
    return len(text).to_bytes(8, "little") + text, places


def settle(handle: int) -> None:
    """Write a file's bytes to the disk and let its memory go."""
    os.fsync(handle)
    _forget(handle, 0, 0)


def _forget(handle: int, offset: int, length: int) -> None:
    """Let the page cache drop bytes of a file; length 0 is to its end.

    Pages that are used again cost less than new ones: those the system first has to clear, and a
    virtual machine to ask its host for.
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(handle, offset, length, os.POSIX_FADV_DONTNEED)


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """All of the bytes, at a place of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], offset + done)
