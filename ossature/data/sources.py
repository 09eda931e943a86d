"""Where documents come from: text, JSONL, Parquet, Hugging Face data sets, the standard library.

`find` lists the files of the inputs in a fixed order, `cut` divides them into parts of about equal
size, `documents` reads one part.  A part is read without the others, so any process can take any.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ossature.data import tables, text

SUFFIXES = {
    ".txt": "text", ".md": "text", ".rst": "text", ".py": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
}  # fmt: skip
STDLIB = "python-stdlib"
# Tests hold files that are wrong on purpose, and many installations leave them out.
STDLIB_LEAVES_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Source(NamedTuple):
    path: str
    kind: str
    size_bytes: int
    mtime_ns: int


class Part(NamedTuple):
    """What one worker reads at a time: some whole files, or a stretch of one."""

    sources: tuple[Source, ...]
    start: int = 0
    stop: int = 0
    """Bytes of a JSONL file, row groups of a Parquet file, batches of an Arrow file; a part from
    0 to 0 is whole files."""

    @property
    def name(self) -> str:
        """For messages: its file or first and last file."""
        names = [source.path for source in self.sources]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


class Found(NamedTuple):
    sources: list[Source]
    ignored: list[str]
    """Files in the folders that are of no kind we read."""


def find(inputs: Sequence[str]) -> Found:
    """The files of the inputs, in the order of the inputs, a folder's by path.

    An input is a file (one that is no JSONL or Parquet is read as text), a folder, `python-stdlib`,
    or the id of a Hugging Face data set: `owner/name`, `owner/name:split` or
    `owner/name:config:split`; the split is `train` unless given.

    Raises:
        ValueError: nothing of that name, or a folder in which nothing is read.
    """
    sources, ignored = [], []
    for name in inputs:
        path = Path(name)
        if name == STDLIB:
            sources += standard_library()
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if _visible(file, path))
            known = [file for file in files if kind_of(file)]
            if not known:
                raise ValueError(f"{path}: no file with one of the suffixes {', '.join(SUFFIXES)}")
            sources += [_source(file, kind_of(file)) for file in known]
            ignored += [str(file) for file in files if not kind_of(file)]
        elif path.is_file():
            sources.append(_source(path, kind_of(path) or "text"))
        else:
            sources += [_source(file, "arrow") for file in tables.arrow_files(name)]
    return Found(sources, ignored)


def kind_of(path: Path) -> str:
    """Of a file by its name, .gz or .zst not counted; empty if we do not know it."""
    name = path.name
    for packed in text.PACKED:
        name = name.removesuffix(packed)
    kind = SUFFIXES.get(Path(name).suffix, "")
    return "" if kind == "parquet" and name != path.name else kind


def standard_library() -> list[Source]:
    """Sources of the running Python's standard library, in an order that is mixed but fixed.

    By path, the last documents (which become the validation split) would be of one package.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in folder.rglob("*.py")
        if not STDLIB_LEAVES_OUT & set(file.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"{STDLIB}: no sources in {folder}")
    names = {file: file.relative_to(folder).as_posix().encode() for file in files}
    files.sort(key=lambda file: hashlib.sha256(names[file]).digest())
    return [_source(file, "text") for file in files]


def _visible(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden


def _source(path: Path, kind: str) -> Source:
    status = path.stat()
    return Source(str(path), kind, status.st_size, status.st_mtime_ns)


def cut(sources: Sequence[Source]) -> list[Part]:
    """The sources as parts, in order; the cuts depend on the sources only.

    Text files go together; a JSONL, Parquet or Arrow file is cut; a compressed file is one part.
    """
    total = sum(source.size_bytes for source in sources)
    size = max(2**19, min(2**28, total // 256))
    parts: list[Part] = []
    group: list[Source] = []
    for source in sources:
        if source.kind == "text":
            group.append(source)
            if sum(member.size_bytes for member in group) < size:
                continue
        if group:
            parts.append(Part(tuple(group)))
            group = []
        if source.kind != "text":
            parts += _cut_one(source, size)
    return parts + ([Part(tuple(group))] if group else [])


def _cut_one(source: Source, size: int) -> list[Part]:
    if source.path.endswith(text.PACKED):
        return [Part((source,))]
    if source.kind == "jsonl":
        units = source.size_bytes
        step = size
    else:
        units = tables.num_units(source.path, source.kind)
        step = max(1, units * size // max(1, source.size_bytes))
    return [Part((source,), start, min(start + step, units)) for start in range(0, units, step)]


def documents(part: Part, text_key: str) -> Iterator[str]:
    """Texts of a part, in order, empty ones too.

    Raises:
        ValueError: a file that is damaged, text that is not UTF-8, a line without `text_key`; names
            file, line or row, and rule.
    """
    for source in part.sources:
        if source.kind == "text":
            yield text.read_text(source.path)
        elif source.kind == "jsonl":
            yield from text.read_jsonl(source.path, part.start, part.stop, text_key)
        else:
            yield from tables.read(source.path, source.kind, part.start, part.stop, text_key)


class Entry(NamedTuple):
    """One record of a file, or why there is none."""

    record: dict[str, Any]
    error: str
    """Empty if it is a record."""
    place: Callable[[], str]
    """Where it stands, "line 7" or "row 7"; to be asked before the next entry is."""


def records(source: Source, start: int = 0, stop: int = 0) -> Iterator[Entry]:
    """Records of a stretch of a JSONL, Parquet or Arrow file, in order, the bad ones too.

    Raises:
        ValueError: a file that is damaged as a whole.
    """
    if source.kind != "jsonl":
        for row, record in tables.records(source.path, source.kind, start, stop):
            place = partial("row {}".format, row)
            if isinstance(record, dict):
                yield Entry(record, "", place)
            else:
                yield Entry({}, str(record), place)
        return
    lines = text.Lines(source.path, start, stop)
    for line in lines:
        try:
            entry = Entry(text.record_of(line), "", lambda: f"line {lines.number()}")
        except ValueError as error:
            entry = Entry({}, str(error), lambda: f"line {lines.number()}")
        yield entry
