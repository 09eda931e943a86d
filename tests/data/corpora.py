"""Small corpora for the tests: documents of numbered tokens, written as indexed files."""

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
