"""Boxes of the tensors of a native folder, without reading what lies around them.

torch.distributed.checkpoint reads a stored part of a tensor whole, however little of it is asked
for; one process that has written a checkpoint has stored every tensor in one part.  A part is
what `torch.save` writes: a zip archive without compression, in which the numbers lie in order,
and a pickle that says so.  The pickle is read without building anything; a part in which the
numbers lie otherwise is read whole, by torch.

Source: torch/distributed/checkpoint/filesystem.py and torch/serialization.py of torch 2.11 - 2.13.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ossature.checkpoint import box as boxes
from ossature.checkpoint.box import Box
from ossature.checkpoint.store import Part, list_weights, parts


class StoredReader:
    """The tensors of a native folder; reads boxes of them, from any thread.

    Raises:
        ValueError: the index is damaged, or points outside of the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.specs = list_weights(folder)
        self._parts = parts(folder)
        self._begin: dict[tuple[str, int], int] = {}
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def box(self, name: str, box: Box) -> Tensor:
        """A range of every dim of a tensor, in the stored dtype.

        Raises:
            ValueError: its bytes are damaged.
        """
        _, dtype = self.specs[name]
        out = torch.empty(boxes.shape_of(box), dtype=dtype)
        for part in self._parts[name]:
            common = boxes.overlap(box, part.box)
            if common is not None:
                here = self._read(name, part, dtype, boxes.within(common, part.box))
                out[boxes.within(common, box)] = here
        return out

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _read(self, name: str, part: Part, dtype: torch.dtype, box: Box) -> Tensor:
        handle = self._handle(part.file)
        what = f"{self.folder / part.file}: {name}"
        place = part.file, part.offset
        if place not in self._begin:
            self._begin[place] = _begin(_Window(handle, part), dtype, what)
        begin = self._begin[place]
        if begin < 0:
            return _load(_Window(handle, part), what)[box]
        return boxes.read_box(
            handle, part.offset + begin, dtype, boxes.shape_of(part.box), box, what
        )

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDONLY)
            return self._handles[file]


class _Window(io.RawIOBase):
    """The bytes of one stored part, as a file of its own."""

    def __init__(self, handle: int, part: Part) -> None:
        self.handle, self.part, self.place = handle, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.part.length}[whence]
        self.place = max(0, base + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.part.length - self.place)]
        count = os.preadv(self.handle, [view], self.part.offset + self.place) if len(view) else 0
        self.place += count
        return count


def _begin(window: _Window, dtype: torch.dtype, what: str) -> int:
    """Byte of the part at which its numbers begin; -1 if they do not lie in order."""
    shape = boxes.shape_of(window.part.box)
    try:
        with zipfile.ZipFile(window) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            saved = _Saved(archive.open(entries["data.pkl"])).load()
            numbers = entries[f"data/{saved.key}"]
            order = archive.read(entries["byteorder"])
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        KeyError,
        AttributeError,
        EOFError,
    ) as error:
        raise ValueError(f"{what}: the bytes of a tensor are damaged") from error
    whole = numbers.file_size == math.prod(shape) * dtype.itemsize
    plain = numbers.compress_type == zipfile.ZIP_STORED and order == b"little"
    if not (whole and plain and saved == _Layout.of(shape, dtype, saved.key)):
        return -1
    window.seek(numbers.header_offset)
    header = io.BufferedReader(window).read(_LOCAL.size)
    name_bytes, extra_bytes = _LOCAL.unpack(header)[-2:]
    return numbers.header_offset + _LOCAL.size + name_bytes + extra_bytes


_LOCAL = struct.Struct("<4s5H3L2H")
"""What stands before the name of a file in a zip archive."""


class _Layout(NamedTuple):
    """How a saved tensor lies in its storage."""

    key: str
    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, key: str) -> _Layout:
        """Of one whose numbers lie in order."""
        stride = torch.empty(shape, device="meta").stride()
        return cls(key, _STORAGES.get(dtype, ""), 0, shape, stride)


_STORAGES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.uint8: "ByteStorage", torch.int64: "LongStorage",
}  # fmt: skip


class _Saved(pickle.Unpickler):
    """Reads how a tensor was saved; nothing is built or run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _layout
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _layout(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Layout:
    _word, kind, key, _device, _numbers = storage
    return _Layout(str(key), kind, offset, tuple(size), tuple(stride))


def _load(window: _Window, what: str) -> Tensor:
    try:
        return torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{what}: the bytes of a tensor are damaged") from error
