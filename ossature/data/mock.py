"""Random tokens for runs without a corpus: independent draws from Zipf's law.

There is nothing to learn but the frequencies, so a model's loss falls from ln(vocab) to the
entropy of the law and stays there; tokens 1, 2, 3, ... would fall to zero and say nothing.
"""

from __future__ import annotations

import numpy as np

from ossature.data.packing import Row, pack

MAX_DOCUMENT_TOKENS = 1024


def zipf(vocab_size: int) -> np.ndarray:
    """Probability of each token: in proportion to 1 / (1 + id)."""
    weight = 1 / np.arange(1, vocab_size + 1)
    return weight / weight.sum()


def entropy(vocab_size: int) -> float:
    """Least loss a model can reach on these tokens, in nats per token."""
    probability = zipf(vocab_size)
    return float(-(probability * np.log(probability)).sum())


class MockRows:
    """Row n is drawn from the generator of (key, n): the same whoever asks, in any order."""

    def __init__(self, vocab_size: int, seq_len: int, separate: bool, *key: int) -> None:
        self.seq_len, self.separate, self.key = seq_len, separate, key
        self.cumulative = np.cumsum(zipf(vocab_size))[:-1]
        self.num_rows = 2**20
        """Rows of one pass: rows 2**20 and on are new ones all the same."""

    def row(self, number: int) -> Row:
        generator = np.random.default_rng([*self.key, number])
        tokens = np.searchsorted(self.cumulative, generator.random(self.seq_len), side="right")
        longest = min(MAX_DOCUMENT_TOKENS, self.seq_len)
        starts = np.cumsum(generator.integers(1, longest, self.seq_len, endpoint=True))
        return pack(tokens, starts[starts < self.seq_len], self.seq_len, self.separate)
