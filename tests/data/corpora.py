"""Small corpora for the tests: documents of numbered tokens, written as indexed files."""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ossature.config import DataConfig
from ossature.data.indexed import Writer
from ossature.data.loader import Batch, Loader


def write_documents(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    writer = Writer(prefix)
    for document in documents:
        writer.add(np.array(document, np.int64), np.array([len(document)]))
    writer.close()
    return prefix


def numbered(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents of these lengths; every token of the corpus has its own number."""
    ends = np.cumsum([first, *lengths])
    return [list(range(a, b)) for a, b in pairwise(ends)]


def loader(path: Path | None = None, **options: Any) -> Loader:
    """A loader over a prefix whose documents all go to training, unless options say otherwise.

    `shares` is the key data.split; the other options are keys of `data` or arguments of Loader.
    """
    data: dict[str, Any] = {"path": path, "seq_len": 8, "split": options.pop("shares", "")}
    if path is not None and path.with_suffix(".idx").exists() and not data["split"]:
        data["split"] = "1"
    keys = "seq_len", "blend", "mock", "separate_documents", "train_blend", "validation_blend"
    for key in keys:
        if key in options:
            data[key] = options.pop(key)
    sizes = {"global_batch_rows": 4, "micro_batch_rows": 1, "vocab_size": 10_000}
    return Loader(DataConfig(**data), **(sizes | options))


def rows(loader: Loader, steps: range) -> list[list[int]]:
    """Tokens of every row a rank gets in these steps."""
    return [
        row.tolist()
        for step in steps
        for batch in loader.micro_batches(step)
        for row in batch.tokens
    ]


def step_rows(loaders: Sequence[Loader], step: int) -> list[list[int]]:
    """Rows of one global batch over all ranks, in no particular order."""
    return sorted(row for loader in loaders for row in rows(loader, range(step, step + 1)))


def first_batch(loader: Loader) -> Batch:
    return next(loader.micro_batches(0))


def as_megatron_reads(prefix: Path) -> list[list[int]]:
    """Documents of a .bin and .idx by the layout of Megatron-Core's reader, with struct alone.

    Every byte of both files is accounted for: magic, version 1, dtype code, two counts, then
    lengths, pointers and document indices; sequences lie in the .bin one after the other.
    """
    raw, data = (Path(f"{prefix}{end}").read_bytes() for end in (".idx", ".bin"))
    assert raw[:9] == b"MMIDIDX\0\0"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", raw, 9)
    letter = {4: "i", 8: "H"}[code]
    item = struct.calcsize(letter)
    assert version == 1 and len(raw) == 34 + 12 * sequences + 8 * documents
    lengths = struct.unpack_from(f"<{sequences}i", raw, 34)
    pointers = struct.unpack_from(f"<{sequences}q", raw, 34 + 4 * sequences)
    borders = struct.unpack_from(f"<{documents}q", raw, 34 + 12 * sequences)
    assert borders[0] == 0 and borders[-1] == sequences and list(borders) == sorted(borders)
    assert len(data) == item * sum(lengths)
    end = 0
    for length, pointer in zip(lengths, pointers, strict=True):
        assert pointer == end
        end += item * length
    found = [
        struct.unpack_from(f"<{n}{letter}", data, at)
        for n, at in zip(lengths, pointers, strict=True)
    ]
    parts = [found[start:stop] for start, stop in pairwise(borders)]
    return [[token for sequence in part for token in sequence] for part in parts]
