"""Which documents share a row: best-fit decreasing.

From the longest to the shortest, each document goes into the fullest row that still has room for
it, or into a new one.  The result depends on the lengths and their order alone.

Source: Johnson, "Near-optimal bin packing algorithms" (MIT, 1973): at most 11/9 of the fewest rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np


def best_fit(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents in the order of their rows, and the place in that order at which each row begins.

    Args:
        lengths: of the documents, in tokens; none may exceed `size`.
        size: tokens of a row.

    Returns:
        Numbers of the documents, ascending within a row; and one more start than there are rows,
        the last of which is the number of documents.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= size)
    descending = np.argsort(-lengths.astype(np.int64), kind="stable")
    row_of = np.zeros(len(lengths), np.int64)
    rows = 0
    with_room: dict[int, list[int]] = {}  # room in tokens -> rows, the oldest last
    rooms = 0  # bit n is set where a row has room for exactly n tokens
    place = 0
    for length, count in _runs(lengths[descending]):
        for document in descending[place : place + count].tolist():
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                stack = with_room[room]
                row = stack.pop()
                if not stack:
                    rooms ^= 1 << room
            else:
                room, row = size, rows
                rows += 1
            left = room - length
            row_of[document] = row
            if left:
                with_room.setdefault(left, []).append(row)
                rooms |= 1 << left
        place += count
    order = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[order], np.arange(rows + 1))
    return order.astype(np.int64), starts.astype(np.int64)


def _runs(descending: np.ndarray) -> Iterator[tuple[int, int]]:
    """Length and number of equal lengths that follow each other."""
    for length, equal in groupby(descending.tolist()):
        yield length, sum(1 for _ in equal)
