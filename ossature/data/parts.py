"""Tokens of one part of the input, in files of their own that a later start finds again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ossature.data.encoder import RankEncoder, encoder
from ossature.data.sources import Part, documents
from ossature.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2**20


class Job(NamedTuple):
    """All that a process needs to make a part."""

    part: Part
    folder: str
    """Where its files go: <key>.bin (tokens), .lengths (of documents) and .json, which is written
    last: a part that has it is done."""
    tokenizer: str
    """Folder of the tokenizer."""
    tokenizer_sha256: str
    text_key: str

    @property
    def path(self) -> Path:
        """Of its files, without suffix.  It changes with whatever the tokens depend on, so a part
        that is found is a part of these inputs."""
        depends_on = (self.part, self.tokenizer_sha256, self.text_key)
        key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]
        return Path(self.folder) / key


class Record(NamedTuple):
    """What a part came to."""

    tokens: int
    documents: int
    empty: int
    """Documents without text, which are left out."""
    sha256: str
    """Of the tokens, then the lengths."""
    found: bool = False
    """Made by an earlier start."""


def make(job: Job) -> Record:
    """Write a part, unless it is there and whole."""
    path = job.path
    record = _find(path)
    if record is not None:
        return record
    digest, length_digest = hashlib.sha256(), hashlib.sha256()
    tokens = total = empty = 0
    partial = {kind: f"{path}.{kind}.partial-{os.getpid()}" for kind in ("bin", "lengths", "json")}
    with open(partial["bin"], "wb") as bin_file, open(partial["lengths"], "wb") as lengths_file:
        for texts in _batches(documents(job.part, job.text_key)):
            kept = [text for text in texts if text]
            ids, lengths = _encoder(job.tokenizer).encode_documents(kept)
            for array, file, hashed in [
                (ids, bin_file, digest),
                (lengths, lengths_file, length_digest),
            ]:
                file.write(array.data)
                hashed.update(array.data)
            tokens, total, empty = tokens + len(ids), total + len(kept), empty + len(texts)
    record = Record(tokens, total, empty - total, digest.hexdigest() + length_digest.hexdigest())
    Path(partial["json"]).write_text(json.dumps(record._asdict()), "utf-8")
    for kind, written in partial.items():
        os.replace(written, f"{path}.{kind}")
    return record


def _find(path: Path) -> Record | None:
    """The record of a part that is there, if its files are those that were written."""
    try:
        record = Record(**json.loads(Path(f"{path}.json").read_text("utf-8")))
        digests = ""
        for kind in ("bin", "lengths"):
            with open(f"{path}.{kind}", "rb") as file:
                digests += hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return record._replace(found=True) if digests == record.sha256 else None


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= 4096:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _encoder(folder: str) -> RankEncoder | Tokenizer:
    return encoder(folder)


def tokens_and_lengths(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of a finished part: its tokens, memory-mapped, and the length of each document."""
    lengths = np.fromfile(f"{path}.lengths", np.int32)
    if not len(lengths):
        return np.zeros(0, np.int32), lengths
    return np.memmap(f"{path}.bin", np.int32, mode="r"), lengths
