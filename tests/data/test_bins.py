from itertools import pairwise

import numpy as np
import pytest

from ossature.data.bins import best_fit


def rows(lengths: list[int], size: int) -> list[list[int]]:
    order, starts = best_fit(np.array(lengths, np.int32), size)
    return [order[a:b].tolist() for a, b in pairwise(starts)]


def test_a_document_goes_into_the_fullest_row_with_room():
    """Rows of 10: 7 and 6 open two; 4 fits the second exactly, 3 the first; then 2, 2, 2."""
    assert rows([3, 2, 7, 4, 2, 6, 2], 10) == [[0, 2], [3, 5], [1, 4, 6]]


def test_a_row_with_less_room_is_filled_first():
    """6 and 7 open two rows; 3 fits both, and goes to the one it fills."""
    assert rows([6, 3, 7], 10) == [[1, 2], [0]]


@pytest.mark.parametrize("size", [1, 2, 64, 4096])
def test_every_document_lies_in_one_row_that_holds_it(size):
    lengths = np.random.default_rng(size).integers(1, size, 500, endpoint=True)
    order, starts = best_fit(lengths, size)

    assert sorted(order.tolist()) == list(range(500))
    assert (starts[0], starts[-1]) == (0, 500)
    assert (np.diff(starts) > 0).all()
    assert np.add.reduceat(lengths[order], starts[:-1]).max() <= size


def log_normal(count: int, mean: float, deviation: float, size: int) -> np.ndarray:
    """Lengths of conversations: many short ones, few long ones, none longer than a row."""
    lengths = np.random.default_rng(0).lognormal(mean, deviation, count).astype(np.int64) + 1
    return lengths[lengths <= size]


@pytest.mark.parametrize("size", [2048, 4096, 8192])
def test_log_normal_lengths_fill_rows_to_98_percent(size):
    """Median 403 tokens, mean 664: what chat sets have."""
    lengths = log_normal(20_000, 6, 1, size)
    _, starts = best_fit(lengths, size)

    filling = lengths.sum() / ((len(starts) - 1) * size)
    assert filling >= 0.98
    # One conversation a row, the other choice, is far from it: the bound means something.
    assert lengths.mean() / size < 0.4


def test_nothing_makes_no_rows():
    order, starts = best_fit(np.zeros(0, np.int32), 8)

    assert (len(order), starts.tolist()) == (0, [0])
