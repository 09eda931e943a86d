"""Documents -> rows of `seq_len` tokens, with position and document ids.

A corpus is one long tape of documents, played again and again; row n is tokens n * seq_len ..
(n + 1) * seq_len - 1 of that tape.  No token is dropped or drawn twice: an epoch is one pass, and
the row at its end is filled up from the beginning of the next.  A document cut by the border of a
row goes on in the next row as a new run, with positions from 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ossature.data.corpus import Corpus
from ossature.data.permutation import Permutation

PADDING_TOKEN = 0  # any id does: masks come from places, never from ids


class Row(NamedTuple):
    """One row of a batch; see `ossature.data.loader.Batch`."""

    tokens: np.ndarray
    position: np.ndarray
    document: np.ndarray
    loss_mask: np.ndarray


@runtime_checkable
class Rows(Protocol):
    """Rows of one corpus in the order they are used."""

    @property
    def num_rows(self) -> int:
        """Rows of one pass."""
        ...

    def row(self, number: int) -> Row: ...


def pack(tokens: np.ndarray, starts: np.ndarray, seq_len: int, separate: bool = True) -> Row:
    """A row of at most `seq_len` tokens; what is missing is padding, one run with document -1.

    Args:
        starts: places in the row at which a document begins, ascending; place 0 always begins one.
        separate: False makes the whole row one document.
    """
    place = np.arange(seq_len)
    first = place == 0
    if separate:
        first[starts] = True
    position = place - np.maximum.accumulate(np.where(first, place, 0))
    document = np.cumsum(first) - 1
    whole = np.full(seq_len, PADDING_TOKEN, np.int64)
    whole[: len(tokens)] = tokens
    padding = slice(len(tokens), None)
    position[padding], document[padding], first[padding] = 0, -1, True
    return Row(whole, position, document, ~first)


class EndlessRows:
    """Training: pass after pass over a corpus, the rows of each in a new order."""

    def __init__(self, corpus: Corpus, seq_len: int, separate: bool, *key: int) -> None:
        if corpus.num_tokens < seq_len:
            raise ValueError(
                f"{corpus.name}: {corpus.num_tokens} tokens of split {corpus.split} do not fill "
                f"one row of data.seq_len ({seq_len})"
            )
        self.corpus, self.seq_len, self.separate = corpus, seq_len, separate
        self.order = lru_cache(maxsize=2)(lambda size, epoch: Permutation(size, *key, epoch))

    @property
    def num_rows(self) -> int:
        return -(-self.corpus.num_tokens // self.seq_len)

    def row(self, number: int) -> Row:
        length, tape = self.seq_len, self.corpus.num_tokens
        epoch = number * length // tape
        # An epoch owns the rows that begin in it, whose number may differ by one between epochs.
        first, last = -(-epoch * tape // length), -(-(epoch + 1) * tape // length)
        start = (first + self.order(last - first, epoch)[number - first]) * length % tape
        ahead = min(length, tape - start)
        tokens, starts = self.corpus.read(start, start + ahead)
        if ahead < length:
            more, next_starts = self.corpus.read(0, length - ahead)
            tokens = np.concatenate([tokens, more])
            starts = np.concatenate([starts, ahead + next_starts])
        return pack(tokens, starts, length, self.separate)


class OnceRows:
    """Validation: each token once, in rows that are the same every time; the last is padded.

    They are in a fixed shuffled order, so that the first rows stand for the whole set.
    """

    def __init__(self, corpus: Corpus, seq_len: int, separate: bool) -> None:
        if not corpus.num_tokens:
            raise ValueError(
                f"{corpus.name}: no documents in split {corpus.split}: give it a larger share"
            )
        self.corpus, self.seq_len, self.separate = corpus, seq_len, separate
        self.num_rows = -(-corpus.num_tokens // seq_len)
        self.order = Permutation(self.num_rows, 0)

    def row(self, number: int) -> Row:
        start = self.order[number] * self.seq_len
        stop = min(start + self.seq_len, self.corpus.num_tokens)
        return pack(*self.corpus.read(start, stop), self.seq_len, self.separate)


def padding_row(seq_len: int) -> Row:
    """A row without any document."""
    return pack(np.zeros(0, np.int64), np.zeros(0, np.int64), seq_len)
