"""Documents in text and JSONL files, plain or compressed (.gz, .zst)."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

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
        raise ValueError(f"{path}: line {line}: {_not_utf8(error)}") from None


class Lines:
    """The lines of a JSONL file that begin at a byte in start .. stop - 1; 0 to 0 is all.

    Lines of nothing but white space are left out, and counted.  A byte order mark at the start of
    the file, as some editors on Windows put it, is no part of the first line.
    """

    def __init__(self, path: str, start: int = 0, stop: int = 0) -> None:
        self.path, self.start, self.stop = path, start, stop
        self._count = 0
        self._before: int | None = None

    def __iter__(self) -> Iterator[bytes]:
        path, stop = self.path, self.stop
        with _open(path) as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # belongs to the part before, unless it is only a line's end
            self._begin = place = self.start and file.tell()
            while not stop or place < stop:
                line = _read(file, path, line=True)
                if not line:
                    return
                self._count += 1
                text = line if place else line.removeprefix(codecs.BOM_UTF8)
                if text and not text.isspace():
                    yield text
                place += len(line)

    def number(self) -> int:
        """Of the line given last, in the whole file, from 1; reads the file up to the start."""
        if self._before is None:
            self._before = _lines_before(self.path, self._begin)
        return self._before + self._count


def read_jsonl(path: str, start: int, stop: int, text_key: str) -> Iterator[str]:
    """The text of every line of a stretch of a file, see `Lines`."""
    lines = Lines(path, start, stop)
    for line in lines:
        try:
            yield _text_of(line, text_key)
        except ValueError as error:
            raise ValueError(f"{path}: line {lines.number()}: {error}") from None


def record_of(line: bytes) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        ValueError: not UTF-8, not JSON or no object; one sentence, without the place.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    return record


def _text_of(line: bytes, text_key: str) -> str:
    try:
        record = record_of(line)
    except ValueError as error:
        missing = f"no key {text_key!r} (--text-key): " if "no object" in str(error) else ""
        raise ValueError(f"{missing}{error}") from None
    if text_key not in record:
        raise ValueError(f"no key {text_key!r} (--text-key): it has {', '.join(record)}")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} must be a text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise ValueError(f"{text_key!r} has half of a surrogate pair: no Unicode text") from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x}: {error.reason}"


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
