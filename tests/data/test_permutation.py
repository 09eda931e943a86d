import pytest

from ossature.data.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000])
def test_every_number_comes_once(size):
    order = Permutation(size, 7, 0)

    assert sorted(order[n] for n in range(size)) == list(range(size))


def test_keys_give_unrelated_orders():
    first, second = Permutation(1000, 1, 0), Permutation(1000, 1, 1)
    same_place = sum(first[n] == second[n] for n in range(1000))
    kept_place = sum(first[n] == n for n in range(1000))

    assert same_place < 10
    assert kept_place < 10


def test_the_order_never_changes_between_versions():
    """A run is resumed with the code of another day: these numbers are part of its state."""
    order = Permutation(1000, 1234, 0, 0)

    assert [order[n] for n in range(5)] == [416, 632, 86, 693, 395]


def test_neighbours_are_sent_far_apart():
    """Over all of a large order, as a uniform draw would: mean distance is a third of the size."""
    size = 10**12
    order = Permutation(size, 5)
    distances = [abs(order[n + 1] - order[n]) / size for n in range(2000)]

    assert abs(sum(distances) / len(distances) - 1 / 3) < 0.03


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError):
        Permutation(10, 0)[10]
