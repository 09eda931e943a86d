"""This rank's stream of batches, and the state that resumes it exactly.

The rows of a run are numbered once and for all by the data, the seed and `seq_len`; optimizer step
s takes rows s * global_batch_rows and on.  Ranks and micro-batches only divide that range among
themselves, so the global batches are the same at any number of ranks, and the state is one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ossature.config import DataConfig
from ossature.data.blend import SPLITS, parse_blend, place, rows_without_repeat
from ossature.data.corpus import WHOLE, Corpus, open_corpus
from ossature.data.mock import MockRows
from ossature.data.packed import EndlessPackedRows, OncePackedRows, PackedRows
from ossature.data.packing import EndlessRows, OnceRows, Row, Rows, padding_row


class Batch(NamedTuple):
    """Rows of tokens, several documents to a row."""

    tokens: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]
    """Place in the document's part that lies in this row, from 0."""
    document: Int[Tensor, "batch seq"]
    """0, 1, 2, ... along each row; -1 is padding, one run at the end."""
    loss_mask: Bool[Tensor, "batch seq"]
    """True where the token itself is a target: everywhere but at the first token of a row or
    document and in padding; of conversations, what `ossature data chat` marked.  The token that
    ends a document is one like any other."""


class Loader:
    """Batches of one split for one data-parallel rank.

    Training runs over the corpus again and again, each pass in a new order.  The other splits are
    finite and the same every time: `num_steps` steps hold each row once, and what the last step
    lacks is rows of padding.

    Args:
        data: the `data` group of a run's config.
        seed: of the order of the rows; the other splits have a fixed one.
        global_batch_rows: rows of one optimizer step, over all ranks and micro-batches.
        rank, world: of the ranks that get different data.
        vocab_size: of the model.
        max_rows: use no more rows of a finite split; 0 uses all.

    Raises:
        ValueError: a corpus that is missing or damaged, sizes that do not divide, tokens that the
            model has no row for.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        split: str = "train",
        seed: int = 0,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int = 0,
        world: int = 1,
        vocab_size: int,
        max_rows: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split ({split}) must be one of {', '.join(SPLITS)}")
        if global_batch_rows % (micro_batch_rows * world):
            raise ValueError(
                f"rows of a global batch ({global_batch_rows}) must be a multiple of rows of a "
                f"micro-batch ({micro_batch_rows}) x data ranks ({world})"
            )
        assert 0 <= rank < world
        self.data, self.split, self.seed, self.vocab_size = data, split, seed, vocab_size
        self.global_batch_rows, self.micro_batch_rows = global_batch_rows, micro_batch_rows
        self.rank, self.world = rank, world
        self.names, self.rows, self.weights, corpora = self._open()
        sizes = [rows.num_rows for rows in self.rows]
        self.weights = self.weights or sizes
        self.num_rows = sum(sizes)
        """Rows of one pass; of a blend with weights: until its first corpus is used up."""
        if len(sizes) > 1:
            self.num_rows = rows_without_repeat(sizes, self.weights)
        if max_rows and split != "train":
            self.num_rows = min(self.num_rows, max_rows)
        self.num_steps = -(-self.num_rows // global_batch_rows)
        """Steps of one pass."""
        self.fingerprint = {
            "data.seq_len": data.seq_len,
            "data.separate_documents": data.separate_documents,
            "seed": seed,
            "split": split,
            "weights": list(self.weights),
            "corpora": corpora,
        }
        self._first_step = self._first_row = self._next_step = 0

    def _open(self) -> tuple[list[str], list[Rows], list[int], list[str]]:
        """Names, rows, weights (empty: by size) and fingerprints of the corpora."""
        data, length, separate = self.data, self.data.seq_len, self.data.separate_documents
        data.check()
        if data.mock:
            key = (SPLITS.index(self.split), self.seed if self.split == "train" else 0)
            mock = MockRows(self.vocab_size, length, separate, *key)
            return ["mock"], [mock], [1], [f"mock {self.vocab_size}"]
        blends = {
            "train": data.train_blend, "validation": data.validation_blend, "test": data.test_blend
        }  # fmt: skip
        each = any(blends.values())
        if each and not blends[self.split]:
            raise ValueError(f"data.{self.split}_blend is empty, and other splits have a blend")
        if data.blend or each:
            key = f"data.{self.split}_blend" if each else "data.blend"
            paths, weights = parse_blend(data.blend or blends[self.split], key)
        else:
            paths, weights = (str(data.path),), None
        corpora = [open_corpus(path, self.split, WHOLE if each else data.split) for path in paths]
        for corpus in corpora:
            if corpus.vocab_size > self.vocab_size:
                raise ValueError(
                    f"{corpus.name}: made with a vocabulary of {corpus.vocab_size}, but the "
                    f"model's vocab_size is {self.vocab_size}"
                )
        rows = [self._rows(corpus, self.seed, n) for n, corpus in enumerate(corpora)]
        prints = [corpus.fingerprint() for corpus in corpora]
        return [corpus.name for corpus in corpora], rows, list(weights or ()), prints

    def _rows(self, corpus: Corpus, *key: int) -> Rows:
        """Rows of a corpus, in the order of this split."""
        training, length = self.split == "train", self.data.seq_len
        separate = self.data.separate_documents
        if corpus.packing is not None:
            if corpus.packing.seq_len != length:
                raise ValueError(
                    f"{corpus.name}: its rows were made for data.seq_len = "
                    f"{corpus.packing.seq_len}, not {length}"
                )
            packed = PackedRows(corpus, *corpus.packing)
            if training:
                return EndlessPackedRows(packed, separate, *key)
            return OncePackedRows(packed, separate)
        if training:
            return EndlessRows(corpus, length, separate, *key)
        return OnceRows(corpus, length, separate)

    def row(self, number: int) -> Row:
        """Row `number` of the global order."""
        if self.split != "train" and number >= self.num_rows:
            return padding_row(self.data.seq_len)
        corpus, its_number = place(number, self.weights)
        row = self.rows[corpus].row(its_number)
        if row.tokens.min() < 0 or row.tokens.max() >= self.vocab_size:
            worst = row.tokens.max() if row.tokens.min() >= 0 else row.tokens.min()
            raise ValueError(
                f"{self.names[corpus]}: token id {worst} is not in the model's vocabulary: "
                f"vocab_size is {self.vocab_size}"
            )
        return row

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of optimizer step `step`, counted from 0."""
        first = self._row_of(step)
        self._next_step = step + 1
        return self._batches(first)

    def _batches(self, first: int) -> Iterator[Batch]:
        micro, stride = self.micro_batch_rows, self.micro_batch_rows * self.world
        for start in range(first, first + self.global_batch_rows, stride):
            mine = start + self.rank * micro
            rows = [self.row(number) for number in range(mine, mine + micro)]
            yield Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*rows, strict=True)))

    def _row_of(self, step: int) -> int:
        first = self._first_row + (step - self._first_step) * self.global_batch_rows
        assert first >= 0
        return first

    def state(self) -> dict[str, Any]:
        """Where the step after the last one asked for begins; the same on every rank."""
        step = self._next_step
        return {"step": step, "row": self._row_of(step), "fingerprint": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, at any number of ranks and any size of the global batch.

        Raises:
            ValueError: the data or their order are not those of the state.
        """
        for key, value in self.fingerprint.items():
            then = state["fingerprint"].get(key)
            if then != value:
                what = "the corpus has" if key == "corpora" else f"{key} ({value}; then {then}) has"
                raise ValueError(
                    f"{', '.join(self.names)}: {what} changed since the checkpoint was written"
                )
        self._first_step = self._next_step = state["step"]
        self._first_row = state["row"]
