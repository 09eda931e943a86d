"""Which corpora, in which proportions, and which of their documents for which split."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
DEFAULT_SPLIT = "9999,8,2"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Blend(NamedTuple):
    paths: tuple[str, ...]
    weights: tuple[int, ...] | None
    """In whole numbers; None takes the corpora in proportion to their size."""


def parse_blend(words: Sequence[str], key: str = "data.blend") -> Blend:
    """`path path ...` or `weight path weight path ...`; one text with spaces is taken apart.

    An odd number of words, or none of them in a weight's place a number: paths only.

    Args:
        key: where the words were given, for messages.

    Raises:
        ValueError: weights in some places only, or a weight that is not positive; names the slot.
    """
    if len(words) == 1 and not os.path.exists(words[0]):
        words = words[0].split()
    numeric = [_NUMBER.fullmatch(word) is not None for word in words[::2]]
    if not words:
        raise ValueError(f"{key} is empty: give paths, or weights and paths in turn")
    if len(words) % 2 or not any(numeric):
        return Blend(tuple(words), None)
    if not all(numeric):
        slot = 2 * numeric.index(False)
        raise ValueError(
            f"{key}: slot {slot} ({words[slot]}) must be a weight, as other even slots are"
        )
    weights = [Fraction(word) for word in words[::2]]
    for slot, weight in enumerate(weights):
        if weight <= 0:
            raise ValueError(f"{key}: slot {2 * slot} (weight {words[2 * slot]}) must be > 0")
    whole = lcm(*(weight.denominator for weight in weights))
    return Blend(tuple(words[1::2]), tuple(int(weight * whole) for weight in weights))


def place(row: int, weights: Sequence[int]) -> tuple[int, int]:
    """Corpus that row `row` of a blend comes from, and which row of that corpus it is.

    The corpora are halved until one is left; each half takes its rows at even distances.  So the
    corpora take turns, each sees its rows 0, 1, 2, ... in order, and among the first n rows a
    corpus has its exact share within log2(corpora) rows: whole numbers, no drift.
    """
    low, high = 0, len(weights)
    while high - low > 1:
        middle, before, taken = _halve(row, weights, low, high)
        low, high, row = (low, middle, before) if taken else (middle, high, row - before)
    return low, row


def counts(rows: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `rows` rows of a blend each corpus gives."""

    def share(rows: int, low: int, high: int) -> list[int]:
        if high - low == 1:
            return [rows]
        middle, before, _ = _halve(rows, weights, low, high)
        return share(before, low, middle) + share(rows - before, middle, high)

    return share(rows, 0, len(weights))


def _halve(row: int, weights: Sequence[int], low: int, high: int) -> tuple[int, int, bool]:
    """Middle of low .. high, rows of the lower half among the first `row`, whether `row` is one."""
    middle = (low + high) // 2
    lower, whole = sum(weights[low:middle]), sum(weights[low:high])
    before = row * lower // whole
    return middle, before, (row + 1) * lower // whole > before


def rows_without_repeat(sizes: Sequence[int], weights: Sequence[int]) -> int:
    """Rows of a blend up to where the first corpus, of so many rows each, is used up."""

    def repeats(rows: int) -> bool:
        return any(n > size for n, size in zip(counts(rows, weights), sizes, strict=True))

    return bisect_right(range(sum(sizes) + 1), False, key=repeats) - 1


def split_documents(num_documents: int, shares: str) -> dict[str, range]:
    """Documents of train, validation and test: contiguous ranges in proportion to "9999,8,2".

    The numbers are found wherever they stand in the text; missing ones are zero.

    Raises:
        ValueError: no numbers, more than three, or all zero.
    """
    numbers = [Fraction(number) for number in re.findall(r"\d+\.?\d*|\.\d+", shares)]
    if not 1 <= len(numbers) <= len(SPLITS) or not sum(numbers) or "-" in shares:
        raise ValueError(
            f"split ({shares}) must have one to three numbers, not all zero, such as "
            f"{DEFAULT_SPLIT}"
        )
    numbers += [Fraction(0)] * (len(SPLITS) - len(numbers))
    ends = [round(num_documents * sum(numbers[:n]) / sum(numbers)) for n in range(4)]
    return {name: range(ends[n], ends[n + 1]) for n, name in enumerate(SPLITS)}
