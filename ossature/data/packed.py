"""Rows that were put together when the data were made: `<prefix>.rows` and `<prefix>.mask`.

They lie beside an indexed file (`indexed.py`) whose documents are conversations.  `.mask` has a
byte per token of `.bin`: 1 where the token is learnt.  `.rows` has little-endian i64 numbers: R + 1
places at which the rows begin in the list that follows, the last of which is its length D; then
the D documents in the order of the rows.  So a row is a handful of documents, wherever they lie.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from ossature.data.corpus import Corpus
from ossature.data.packing import Row, pack
from ossature.data.permutation import Permutation


def mask_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.mask")


def rows_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.rows")


def write_rows(prefix: Path | str, order: np.ndarray, starts: np.ndarray) -> None:
    """Write `.rows`; see `bins.best_fit` for the two arrays."""
    np.concatenate([starts, order]).astype("<i8").tofile(rows_path(prefix))


class PackedRows:
    """Rows of one split of a folder made by `ossature data chat`, in the order of the file."""

    def __init__(self, corpus: Corpus, num_rows: int, seq_len: int) -> None:
        prefix = corpus.file.prefix
        expected = {mask_path(prefix): corpus.num_tokens}
        expected[rows_path(prefix)] = 8 * (num_rows + 1 + corpus.num_documents)
        for path, size in expected.items():
            if not path.is_file():
                raise ValueError(f"{path}: missing")
            if path.stat().st_size != size:
                raise ValueError(
                    f"{path}: truncated or damaged: {path.stat().st_size} bytes, not {size}"
                )
        self.corpus, self.num_rows, self.seq_len = corpus, num_rows, seq_len
        self.starts = self.order = np.zeros(0, np.int64)
        self.mask = np.zeros(0, np.uint8)
        if corpus.num_tokens:
            numbers = np.memmap(rows_path(prefix), "<i8", mode="r")
            self.starts, self.order = numbers[: num_rows + 1], numbers[num_rows + 1 :]
            self.mask = np.memmap(mask_path(prefix), np.uint8, mode="r")

    def documents(self, row: int) -> list[int]:
        """Numbers of the documents in a row."""
        return self.order[self.starts[row] : self.starts[row + 1]].tolist()

    def row(self, number: int, separate: bool = True) -> Row:
        """A row, padded to `seq_len`.

        Raises:
            ValueError: documents that do not fit: the files are damaged.
        """
        file = self.corpus.file
        spans = [(file.document_start(n), file.document_start(n + 1)) for n in self._known(number)]
        lengths = [stop - start for start, stop in spans]
        if sum(lengths) > self.seq_len:
            raise ValueError(
                f"{rows_path(file.prefix)}: damaged: row {number} has {sum(lengths)} tokens, more "
                f"than {self.seq_len}"
            )
        tokens = np.concatenate([file.tokens(start, stop) for start, stop in spans])
        starts = np.cumsum([0, *lengths[:-1]])
        row = pack(tokens, starts, self.seq_len, separate)
        learnt = np.zeros(self.seq_len, bool)
        learnt[: len(tokens)] = np.concatenate([self.mask[a:b] for a, b in spans]) != 0
        file.release()
        return row._replace(loss_mask=row.loss_mask & learnt)

    def _known(self, number: int) -> list[int]:
        documents = self.documents(number)
        if not documents or not 0 <= min(documents) <= max(documents) < self.corpus.num_documents:
            raise ValueError(
                f"{rows_path(self.corpus.file.prefix)}: damaged: row {number} names documents that "
                "are not there"
            )
        return documents


class EndlessPackedRows:
    """Training: pass after pass over the rows, each in a new order."""

    def __init__(self, rows: PackedRows, separate: bool, *key: int) -> None:
        _check_some(rows)
        self.rows, self.separate, self.num_rows = rows, separate, rows.num_rows
        self.order = lru_cache(maxsize=2)(lambda epoch: Permutation(rows.num_rows, *key, epoch))

    def row(self, number: int) -> Row:
        epoch, place = divmod(number, self.num_rows)
        return self.rows.row(self.order(epoch)[place], self.separate)


class OncePackedRows:
    """Validation: each row once, in a fixed shuffled order."""

    def __init__(self, rows: PackedRows, separate: bool) -> None:
        _check_some(rows)
        self.rows, self.separate, self.num_rows = rows, separate, rows.num_rows
        self.order = Permutation(rows.num_rows, 0)

    def row(self, number: int) -> Row:
        return self.rows.row(self.order[number], self.separate)


def _check_some(rows: PackedRows) -> None:
    if not rows.num_rows:
        corpus = rows.corpus
        raise ValueError(
            f"{corpus.name}: no conversations in split {corpus.split}: give it a larger share"
        )
