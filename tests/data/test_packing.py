import numpy as np

from ossature.data.packing import pack, padding_row

NONE = np.zeros(0, np.int64)


def packed(tokens: int, starts: list[int], seq_len: int = 8, separate: bool = True):
    row = pack(np.arange(1, tokens + 1), np.array(starts, np.int64), seq_len, separate)
    return [field.astype(np.int64).tolist() for field in row]


def test_documents_of_a_row_by_hand():
    tokens, position, document, loss_mask = packed(8, [3, 7])

    assert tokens == [1, 2, 3, 4, 5, 6, 7, 8]
    assert position == [0, 1, 2, 0, 1, 2, 3, 0]
    assert document == [0, 0, 0, 1, 1, 1, 1, 2]
    assert loss_mask == [0, 1, 1, 0, 1, 1, 1, 0]


def test_padding_is_one_run_and_no_document():
    tokens, position, document, loss_mask = packed(5, [0, 3])

    assert tokens == [1, 2, 3, 4, 5, 0, 0, 0]
    assert document == [0, 0, 0, 1, 1, -1, -1, -1]
    assert position == [0, 1, 2, 0, 1, 0, 0, 0]
    assert loss_mask == [0, 1, 1, 0, 1, 0, 0, 0]


def test_documents_share_a_row_only_when_that_is_asked_for():
    _, position, document, loss_mask = packed(8, [3, 7], separate=False)

    assert position == list(range(8))
    assert document == [0] * 8
    assert loss_mask == [0] + [1] * 7


def test_a_row_of_padding_counts_nothing():
    row = padding_row(4)

    assert row.document.tolist() == [-1] * 4
    assert not row.loss_mask.any()


def test_the_mask_comes_from_places_and_never_from_ids():
    end = 199999
    row = pack(np.array([5, end, end, 6, end]), np.array([0, 2, 3]), 5)

    assert row.loss_mask.tolist() == [False, True, False, False, True]
