"""Documents in text and JSONL files, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator

PACKED = (".gz", ".zst")
CHUNK_BYTES = 2**20


def read_text(path: str) -> str:
    """A whole file as one document, line ends as they are."""
    with _open(path) as file:
        raw = _read(file, path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(_not_utf8(path, line, error)) from None


def read_jsonl(path: str, start: int, stop: int, text_key: str) -> Iterator[str]:
    """The text of every line that begins at a byte in start .. stop - 1; 0 to 0 is all.

    Lines of nothing but white space are not documents.
    """
    with _open(path) as file:
        if start:
            file.seek(start - 1)
            file.readline()  # belongs to the part before, unless it is only a line's end
        begin = start and file.tell()
        place, number = begin, 0
        while not stop or place < stop:
            line = _read(file, path, line=True)
            if not line:
                return
            number += 1
            if not line.isspace():
                try:
                    yield _text_of(line, text_key)
                except ValueError as error:
                    number += _lines_before(path, begin)
                    if isinstance(error, UnicodeDecodeError):
                        raise ValueError(_not_utf8(path, number, error)) from None
                    raise ValueError(f"{path}: line {number}: {error}") from None
            place += len(line)


def _text_of(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    if not isinstance(record, dict) or text_key not in record:
        keys = f"it has {', '.join(record)}" if isinstance(record, dict) else "it is no object"
        raise ValueError(f"no key {text_key!r} (--text-key): {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} must be a text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{text_key!r} has half of a surrogate pair: no Unicode text") from None
    return text


def _not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    return f"{path}: line {line}: not UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}"


def _lines_before(path: str, end: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        for start in range(0, end, CHUNK_BYTES):
            lines += file.read(min(CHUNK_BYTES, end - start)).count(b"\n")
    return lines


def _read(file: io.BufferedIOBase, path: str, line: bool = False) -> bytes:
    try:
        return file.readline() if line else file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or damaged: {error}") from None


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Zstandard(path), CHUNK_BYTES)
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """The bytes in a .zst file of any number of frames.

    Not zstandard's own stream reader: that one takes a truncated file for one that ends.
    """

    def __init__(self, path: str) -> None:
        import zstandard

        self.path, self.error = path, zstandard.ZstdError
        self.file = open(path, "rb")  # noqa: SIM115
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame = self.new_frame()
        self.begun = False
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        while not self.ready:
            packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame, self.begun = self.new_frame(), False
            packed = packed or self.file.read(CHUNK_BYTES)
            if not packed:
                if self.begun:
                    raise ValueError(f"{self.path}: truncated: it ends inside a frame")
                return 0
            try:
                self.ready, self.begun = self.frame.decompress(packed), True
            except self.error as error:
                raise ValueError(f"{self.path}: damaged: {error}") from None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()
