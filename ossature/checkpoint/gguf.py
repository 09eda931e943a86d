"""GGUF files, read: a header of keys and values, the places of tensors, and boxes of them.

A file is: `GGUF`, a version, the numbers of tensors and keys; the keys with their values; name,
sizes (the last dim first), type and offset of every tensor; padding; the data, each tensor padded.
All is little-endian.  The reader of the package `gguf` walks through every token as an array of its
own and believes every length it finds; this one takes a second for a published vocabulary, and a
damaged file is a sentence.  tests/convert/test_gguf.py compares the two.

A number of type MXFP4 lies in a group of 32: one byte of scale, then 16 bytes of codes, of which
byte j holds number j (low) and number j + 16 (high).  Elsewhere in this project, as in Hugging
Face's files, a byte holds neighbours: numbers 2 j and 2 j + 1.

Source: docs/gguf.md and ggml/src/ggml-common.h (block_mxfp4) of ggml-org/ggml.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from ossature.checkpoint.box import Box, read_box

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
GROUP, GROUP_BYTES = 32, 17
"""Numbers, and bytes, of a group in MXFP4."""
MOST_DIMS = 4
PLAIN: dict[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
MXFP4 = 39
WORDS = {0: "F32", 1: "F16", 30: "BF16", MXFP4: "MXFP4"}
"""Types of tensors that are read, by GGML's number for them."""
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class Place(NamedTuple):
    """Where and how a tensor lies."""

    type: int
    shape: tuple[int, ...]
    """Of numbers, the last dim the one that lies together."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        count = math.prod(self.shape)
        return count // GROUP * GROUP_BYTES if self.type == MXFP4 else count * itemsize(self.type)


def itemsize(type: int) -> int:
    return PLAIN[type].itemsize


class GgufFile:
    """The fields and tensors of a file; boxes of tensors are read from any thread.

    Raises:
        ValueError: the file is cut short, damaged, or holds a type of tensor that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields, self.places = read_header(path)
        self._handle = os.open(path, os.O_RDONLY)

    def box(self, name: str, box: Box) -> Tensor:
        """A box of a tensor; of one in MXFP4 the last range counts bytes of its rows."""
        type, shape, offset = self.places[name]
        dtype = PLAIN.get(type, torch.uint8)
        if type == MXFP4:
            shape = (*shape[:-1], shape[-1] // GROUP * GROUP_BYTES)
        return read_box(self._handle, offset, dtype, shape, box, f"{self.path}: {name}")

    def close(self) -> None:
        os.close(self._handle)


def to_groups(
    blocks: UInt8[Tensor, "*rows groups 16"], scales: UInt8[Tensor, "*rows groups"]
) -> UInt8[Tensor, "*rows bytes"]:
    """Rows as GGUF has them, of MXFP4 as Hugging Face has it; no number changes."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (..., groups, 32)
    low, high = codes.chunk(2, dim=-1)
    return torch.cat((scales[..., None], low | high << 4), dim=-1).flatten(-2)


def from_groups(
    rows: UInt8[Tensor, "*rows bytes"],
) -> tuple[UInt8[Tensor, "*rows groups 16"], UInt8[Tensor, "*rows groups"]]:
    """The inverse of `to_groups`: blocks and scales."""
    groups = rows.unflatten(-1, (-1, GROUP_BYTES))
    packed = groups[..., 1:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    return codes[..., ::2] | codes[..., 1::2] << 4, groups[..., 0].contiguous()


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    """The fields of a file by key, and the places of its tensors by name."""
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{path}: not a GGUF file: {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Walk(path, data, size).header()


class _Walk:
    """Through a header, byte after byte; every length is checked before it is believed."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def header(self) -> tuple[dict[str, Any], dict[str, Place]]:
        if self.data[:4] != MAGIC:
            raise ValueError(f"{self.path}: not a GGUF file: it begins with {self.data[:4]!r}")
        self.at = 4
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path}: GGUF of version {version}, not 2 or 3")
        tensors, keys = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in fields:
                raise ValueError(f"{self.path}: {key} is there twice")
            fields[key] = self.value(self.number("I"), key)
        found: dict[str, Place] = {}
        for _ in range(tensors):
            name = self.string()
            if name in found:
                raise ValueError(f"{self.path}: {name} is there twice")
            found[name] = self.place(name)
        return fields, self.placed(found, fields.get("general.alignment", ALIGNMENT))

    def placed(self, found: dict[str, Place], step: Any) -> dict[str, Place]:
        """With offsets from the start of the file; no two tensors overlap, and none is cut."""
        if not isinstance(step, int) or step < 8 or step & (step - 1):
            raise ValueError(f"{self.path}: general.alignment ({step!r}) is no power of two")
        end = start = _padded(self.at, step)
        before = "the header"
        places = {name: p._replace(offset=start + p.offset) for name, p in found.items()}
        for name, place in sorted(places.items(), key=lambda item: item[1].offset):
            if place.offset != _padded(end, step):
                what = "overlap" if place.offset < end else "do not follow"
                raise ValueError(f"{self.path}: the bytes of {name} {what} those of {before}")
            end, before = place.offset + place.num_bytes, name
        if self.size < end:
            raise ValueError(
                f"{self.path}: cut short: {self.size} bytes, its header describes {end}"
            )
        if self.size > _padded(end, step):
            raise ValueError(
                f"{self.path}: too long: {self.size} bytes, its header describes {end}"
            )
        return places

    def place(self, name: str) -> Place:
        dims = self.number("I")
        if not 1 <= dims <= MOST_DIMS:
            raise ValueError(f"{self.path}: {name} has {dims} dims")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        type, offset = self.number("I"), self.number("Q")
        if type not in WORDS:
            raise ValueError(
                f"{self.path}: {name} has GGML's type {type}; only {', '.join(WORDS.values())} "
                "are read"
            )
        if type == MXFP4 and shape[-1] % GROUP:
            raise ValueError(f"{self.path}: {name} is MXFP4 in rows of {shape[-1]} numbers")
        return Place(type, shape, offset)

    def value(self, type: int, key: str) -> Any:
        if type in _SCALARS:
            return self.number(_SCALARS[type])
        if type == _STRING:
            return self.string()
        if type != _ARRAY:
            raise ValueError(f"{self.path}: {key} has a value of the unknown type {type}")
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self.room(8 * count)
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.path}: {key} is a list of the unknown type {kind}")
        code = _SCALARS[kind]
        bytes_ = count * struct.calcsize(f"<{code}")
        start = self.room(bytes_)
        self.at += bytes_
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def number(self, code: str) -> Any:
        start = self.room(struct.calcsize(f"<{code}"))
        (value,) = struct.unpack_from(f"<{code}", self.data, start)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        start = self.room(length)
        self.at += length
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: a text at byte {start} is not UTF-8") from None

    def room(self, length: int) -> int:
        """Where we are, if so many bytes are left."""
        if length > self.size - self.at:
            raise ValueError(f"{self.path}: cut short: its header goes on beyond {self.size} bytes")
        return self.at


def _padded(count: int, step: int) -> int:
    return -(-count // step) * step
