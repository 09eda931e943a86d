"""Megatron's indexed tokens: `<prefix>.bin` (ids, one after the other) and `<prefix>.idx`.

The index, little-endian: magic "MMIDIDX" and two zero bytes, u64 version 1, u8 dtype code, u64
number of sequences S, u64 length D of the document indices, then S lengths (i32, tokens), S
pointers (i64, *bytes* into .bin), D document indices (i64): the sequence at which each document
begins, and S at the end.  So D is the number of documents plus one.

Source: NVIDIA/Megatron-LM `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import bisect
import mmap
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
FLOATS = {6: "float64", 7: "float32"}


class IndexedTokens:
    """Documents of one prefix, memory-mapped: opening reads the header and three numbers.

    Tokens are addressed by their place in the file.  Sequences must lie in the file in the order
    of the index and without gaps, as every writer leaves them; the ends are checked when opened
    and each stretch when it is read, because checking all would read the whole index.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        index, tokens = index_path(prefix), tokens_path(prefix)
        for path in (index, tokens):
            if not path.is_file():
                raise ValueError(f"{path}: missing; expected a prefix with .bin and .idx")
        size = index.stat().st_size
        with index.open("rb") as file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size:
                raise ValueError(f"{index}: truncated: {size} bytes do not hold the header")
            magic, version, code, sequences, indices = HEADER.unpack(head)
            self._check_header(index, magic, version, code)
            expected = HEADER.size + 12 * sequences + 8 * indices
            if size == expected + sequences and sequences:
                raise ValueError(f"{index}: has modes (a multimodal index), which are not read")
            if size != expected or indices < 1:
                raise ValueError(
                    f"{index}: truncated or damaged: {size} bytes, but {sequences} sequences and "
                    f"{indices} document indices take {expected}"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.madvise(mmap.MADV_RANDOM)  # a look-up touches few pages far apart
        self._mapped = [mapped]
        self.dtype = np.dtype(DTYPES[code])
        self.num_documents = indices - 1
        # These arrays are not aligned (34 bytes before them): numpy would copy one whole to search
        # it, so look-ups go through `bisect`, element by element.
        self._lengths = np.frombuffer(mapped, "<i4", sequences, HEADER.size)
        self._pointers = np.frombuffer(mapped, "<i8", sequences, HEADER.size + 4 * sequences)
        self._documents = np.frombuffer(mapped, "<i8", indices, HEADER.size + 12 * sequences)
        self._check_ends(index, tokens)
        self.num_tokens = tokens.stat().st_size // self.dtype.itemsize
        self._tokens = np.zeros(0, self.dtype)
        if self.num_tokens:
            with tokens.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._tokens = np.frombuffer(mapped, self.dtype)
            self._mapped.append(mapped)

    def _check_header(self, index: Path, magic: bytes, version: int, code: int) -> None:
        if magic != MAGIC:
            raise ValueError(f"{index}: not an index of tokens: it does not begin with MMIDIDX")
        if version != 1:
            raise ValueError(f"{index}: version {version}, but only version 1 is known")
        if code not in DTYPES:
            what = f"{FLOATS[code]} numbers" if code in FLOATS else "an unknown type"
            raise ValueError(f"{index}: dtype code {code} is {what}: not token ids")

    def _check_ends(self, index: Path, tokens: Path) -> None:
        sequences, size = len(self._lengths), tokens.stat().st_size
        if self._documents[0] != 0 or self._documents[-1] != sequences:
            raise ValueError(f"{index}: document indices must run from 0 to {sequences}")
        end = 0
        if sequences:
            end = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
            if self._pointers[0] != 0:
                raise ValueError(f"{index}: the first sequence must begin at byte 0")
        if size != end:
            raise ValueError(f"{tokens}: {size} bytes, but its index describes {end}: truncated?")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Ids of the tokens start .. stop - 1 of the file, as int64."""
        assert 0 <= start <= stop <= self.num_tokens
        return self._tokens[start:stop].astype(np.int64)

    def release(self) -> None:
        """Give up the pages that were read: they stay in the system's cache, but no longer count
        as memory of this process, which would otherwise grow by all it ever reads."""
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)

    def document_start(self, document: int) -> int:
        """Place of a document's first token; `num_documents` gives the end of the file."""
        sequence = int(self._documents[document])
        if sequence == len(self._pointers):
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Places in start .. stop - 1 at which a document begins, ascending."""
        first = bisect.bisect_left(range(self.num_documents), start, key=self.document_start)
        last = bisect.bisect_left(
            range(self.num_documents), stop, lo=first, key=self.document_start
        )
        self._check_stretch(start, stop)
        sequences = self._documents[first:last].astype(np.int64)
        sequences = sequences[sequences < len(self._pointers)]  # not of empty documents at the end
        if not len(sequences):
            return sequences
        # A slice, then its elements: numpy would align (copy) the whole array to pick from it.
        pointers = self._pointers[sequences[0] : sequences[-1] + 1].astype(np.int64)
        return np.unique(pointers[sequences - sequences[0]] // self.dtype.itemsize)

    def _check_stretch(self, start: int, stop: int) -> None:
        """Every sequence in these tokens begins where the one before it ends."""
        item = self.dtype.itemsize
        first = max(0, bisect.bisect_right(self._pointers, start * item) - 1)
        last = bisect.bisect_left(self._pointers, stop * item, lo=first)
        pointers = self._pointers[first:last].astype(np.int64)
        lengths = self._lengths[first:last].astype(np.int64)
        ends = np.append(pointers[1:], self._pointers[last] if last < len(self._pointers) else
                         self.num_tokens * item)  # fmt: skip
        if (lengths < 0).any() or (pointers + lengths * item != ends).any():
            raise ValueError(
                f"{index_path(self.prefix)}: damaged: sequences {first} to {last - 1} do not "
                "follow each other in the .bin"
            )


class Writer:
    """Write documents to `<prefix>.bin` and, on `close`, `<prefix>.idx`, in bounded memory."""

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(DTYPES[4])
        self.num_documents = self.num_tokens = 0
        self._tokens: BinaryIO = tokens_path(prefix).open("wb")
        self._lengths: BinaryIO = index_path(prefix).open("w+b")
        self._lengths.write(HEADER.pack(MAGIC, 1, 4, 0, 1))  # rewritten at the end

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after the other, and the length of each."""
        assert lengths.sum() == len(tokens)
        tokens.astype(self.dtype, casting="same_kind", copy=False).tofile(self._tokens)
        lengths.astype("<i4", copy=False).tofile(self._lengths)
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def close(self, chunk: int = 2**20) -> None:
        """Complete the index, `chunk` documents at a time."""
        file, documents, pointer = self._lengths, self.num_documents, 0
        file.flush()
        for start in range(0, documents, chunk):
            file.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(file.read(4 * min(chunk, documents - start)), "<i4")
            ends = pointer + np.cumsum(lengths.astype("<i8") * self.dtype.itemsize)
            file.seek(HEADER.size + 4 * documents + 8 * start)
            file.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for start in range(0, documents + 1, chunk):
            stop = min(start + chunk, documents + 1)
            file.write(np.arange(start, stop, dtype="<i8").tobytes())
        file.seek(0)
        file.write(HEADER.pack(MAGIC, 1, 4, documents, documents + 1))
        self._tokens.close()
        file.close()


def tokens_path(prefix: Path | str) -> Path:
    """<prefix>.bin; not `with_suffix`, which would cut a prefix that contains a dot."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """<prefix>.idx"""
    return Path(f"{prefix}.idx")
