"""A true shuffle of all documents in bounded memory, on disk.

Every document has a random key.  Once through the parts, in order: each document is appended to the
bucket that holds its stretch of keys.  Then bucket by bucket, sorted by key.  The order is that of
the keys, which depend on the seed and the documents' numbers alone: not on the buckets.

Disk: the buckets are one more copy of the tokens, and each is deleted once it is written out.
Memory: a part and a bucket.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ossature.data.permutation import random_keys

BUCKET_BYTES = 2**27
MOST_BUCKETS = 1024
CHUNK_TOKENS = 2**22

Documents = tuple[np.ndarray, np.ndarray]
"""Tokens of several documents, one after the other; the length of each."""


def shuffled(
    parts: Iterator[Documents], total_tokens: int, seed: int, folder: Path
) -> Iterator[Documents]:
    """The documents of all parts in random order, some at a time.

    Args:
        total_tokens: of all parts.
        folder: for the buckets; what an earlier start left there is deleted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    buckets = min(MOST_BUCKETS, 1 + 4 * total_tokens // BUCKET_BYTES)
    first = 0
    for tokens, lengths in parts:
        keys = random_keys(first, first + len(lengths), seed)
        first += len(lengths)
        # The upper half of the key, scaled to 0 .. buckets - 1: ascending as the keys are.
        bucket = ((keys >> np.uint64(32)) * np.uint64(buckets)) >> np.uint64(32)
        for number in np.unique(bucket).tolist():
            chosen = np.flatnonzero(bucket == number)
            _append(folder, number, _gather(tokens, lengths, chosen), lengths[chosen], keys[chosen])
    for number in range(buckets):
        if _path(folder, number, "keys").exists():
            yield from _sorted(folder, number)
    shutil.rmtree(folder)


def _path(folder: Path, bucket: int, kind: str) -> Path:
    return folder / f"{bucket:04}.{kind}"


def _append(
    folder: Path, bucket: int, tokens: np.ndarray, lengths: np.ndarray, keys: np.ndarray
) -> None:
    for kind, array in (("bin", tokens), ("lengths", lengths), ("keys", keys)):
        with _path(folder, bucket, kind).open("ab") as file:
            array.tofile(file)


def _sorted(folder: Path, bucket: int) -> Iterator[Documents]:
    lengths = np.fromfile(_path(folder, bucket, "lengths"), np.int32)
    order = np.argsort(np.fromfile(_path(folder, bucket, "keys"), np.uint64), kind="stable")
    tokens = np.memmap(_path(folder, bucket, "bin"), np.int32, mode="r")
    # Cut where CHUNK_TOKENS are full; a document is never cut.
    chunk_of = np.cumsum(lengths[order], dtype=np.int64) // CHUNK_TOKENS
    for chosen in np.split(order, np.flatnonzero(np.diff(chunk_of)) + 1):
        yield _gather(tokens, lengths, chosen), lengths[chosen]
    del tokens
    for kind in ("bin", "lengths", "keys"):
        _path(folder, bucket, kind).unlink()


def _gather(tokens: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Tokens of the chosen documents."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts, ends = (ends - lengths)[chosen].tolist(), ends[chosen].tolist()
    return np.concatenate([tokens[a:b] for a, b in zip(starts, ends, strict=True)])
