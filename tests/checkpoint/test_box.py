"""A box of a tensor in a file: the right numbers, and no byte more is read."""

import os

import pytest
import torch

from ossature.checkpoint import box as boxes

SHAPE = (5, 4, 6, 3)


@pytest.fixture
def stored(tmp_path):
    """An open file with a tensor after 7 other bytes, and the tensor."""
    tensor = torch.randn(SHAPE)
    (tmp_path / "file").write_bytes(b"1234567" + tensor.numpy().tobytes())
    handle = os.open(tmp_path / "file", os.O_RDONLY)
    yield handle, tensor
    os.close(handle)


@pytest.mark.parametrize(
    ("box", "reads"),
    [
        ("0:5, 0:4, 0:6, 0:3", 1),
        ("2:4, 0:4, 0:6, 0:3", 1),
        ("2:4, 1:3, 0:6, 0:3", 2),
        ("2:3, 1:3, 2:6, 0:3", 2),
        ("0:5, 0:4, 5:6, 0:3", 20),
        ("1:3, 2:4, 1:4, 1:3", 12),
        ("1:3, 2:2, 1:4, 1:3", 0),
    ],
)
def test_a_box_is_read_in_runs_and_nothing_around_it(stored, box, reads, monkeypatch):
    handle, tensor = stored
    cut = tuple(slice(*map(int, part.split(":"))) for part in box.split(", "))
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])

    found = boxes.read_box(handle, 7, tensor.dtype, SHAPE, cut, "file: w")
    assert torch.equal(found, tensor[cut])
    assert len(counts) == reads and sum(counts) == 4 * tensor[cut].numel()


def test_a_file_that_ends_within_a_box_is_named(stored):
    handle, tensor = stored
    with pytest.raises(ValueError, match="file: w: the file was cut short"):
        boxes.read_box(handle, 8, tensor.dtype, SHAPE, boxes.rows(SHAPE, 4, 5), "file: w")


def test_pieces_of_a_box_make_up_the_box():
    box = (slice(3, 10), slice(2, 6))
    pieces = boxes.pieces(box, 12)

    assert pieces == [(slice(n, min(n + 3, 10)), slice(2, 6)) for n in (3, 6, 9)]
    assert boxes.pieces(box, 1) == [(slice(n, n + 1), slice(2, 6)) for n in range(3, 10)]
    assert boxes.pieces((slice(3, 3), slice(0, 4)), 12) == []


def test_what_two_boxes_share_is_counted_from_the_corner_of_either():
    one, other = (slice(2, 8), slice(0, 5)), (slice(6, 9), slice(3, 7))
    common = boxes.overlap(one, other)

    assert common == (slice(6, 8), slice(3, 5))
    assert boxes.within(common, other) == (slice(0, 2), slice(0, 2))
    assert boxes.overlap(one, (slice(8, 9), slice(0, 5))) is None
