import math

import pytest

from ossature.data.blend import (
    Blend,
    counts,
    parse_blend,
    place,
    rows_without_repeat,
    split_documents,
)


@pytest.mark.parametrize(
    ("words", "blend"),
    [
        (["a", "b", "c"], Blend(("a", "b", "c"), None)),
        (["a", "b"], Blend(("a", "b"), None)),
        (["0.3", "a", "0.7", "b"], Blend(("a", "b"), (3, 7))),
        (["1", "a", "2.5", "b"], Blend(("a", "b"), (2, 5))),
        (["0.25 a 0.75 b"], Blend(("a", "b"), (1, 3))),
        (["a b c"], Blend(("a", "b", "c"), None)),
        (["a"], Blend(("a",), None)),
    ],
)
def test_a_list_is_read_as_megatron_reads_it(words, blend):
    assert parse_blend(words) == blend


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.3", "a", "b", "c"], r"slot 2 \(b\) must be a weight"),
        (["a", "b", "0.3", "c"], r"slot 0 \(a\) must be a weight"),
        (["0", "a", "1", "b"], r"slot 0 \(weight 0\) must be > 0"),
        (["1", "a", "-2", "b"], r"slot 2 \(weight -2\) must be > 0"),
        ([], "data.blend is empty"),
    ],
)
def test_a_mixed_list_names_the_slot(words, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(words)


WEIGHTS = [3, 7, 1, 29, 60, 2]


def test_each_corpus_gives_its_rows_in_order():
    seen = [0] * len(WEIGHTS)
    for row in range(200):
        corpus, number = place(row, WEIGHTS)
        assert number == seen[corpus]
        seen[corpus] += 1
        assert seen == counts(row + 1, WEIGHTS)


def test_shares_are_exact_after_every_row():
    for rows in range(1, 500):
        for count, weight in zip(counts(rows, WEIGHTS), WEIGHTS, strict=True):
            exact = rows * weight / sum(WEIGHTS)
            assert abs(count - exact) < math.ceil(math.log2(len(WEIGHTS)))
    assert counts(10 * sum(WEIGHTS), WEIGHTS) == [10 * weight for weight in WEIGHTS]


def test_a_blend_ends_where_its_first_corpus_is_used_up():
    rows = rows_without_repeat([5, 100], [1, 1])

    assert counts(rows, [1, 1])[0] == 5
    assert counts(rows + 1, [1, 1])[0] == 6
    assert rows_without_repeat([5, 100, 2], [5, 100, 2]) == 107


def test_a_split_is_contiguous_ranges_in_proportion():
    assert split_documents(10009, "9999,8,2") == {
        "train": range(9999), "validation": range(9999, 10007), "test": range(10007, 10009),
    }  # fmt: skip
    assert [len(part) for part in split_documents(1000, "0.9 / 0.1").values()] == [900, 100, 0]
    assert [len(part) for part in split_documents(7, "1").values()] == [7, 0, 0]
    assert sum(len(part) for part in split_documents(12345, "9999,8,2").values()) == 12345


@pytest.mark.parametrize("shares", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2,3"])
def test_a_split_without_sense_is_refused(shares):
    with pytest.raises(ValueError, match="must have one to three numbers"):
        split_documents(10, shares)
