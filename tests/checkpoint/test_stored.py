"""Boxes of the tensors of a native folder, whoever has written it."""

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ossature.checkpoint import store
from ossature.checkpoint.stored import StoredReader
from tests.ranks import run_ranks

WEIGHT = torch.arange(11 * 6 * 4).reshape(11, 6, 4).float()
BOXES = [(slice(0, 11), slice(0, 6), slice(0, 4)), (slice(2, 7), slice(1, 5), slice(3, 4))]


def _write(rank: int, world: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    places = [Shard(1), Shard(0)]
    weight = distribute_tensor(WEIGHT, mesh, places, src_data_rank=None)
    store.save_weights(folder, {"w": weight, "b": torch.ones(3)})


def test_a_box_is_put_together_from_the_parts_of_several_ranks(tmp_path):
    run_ranks(4, _write, tmp_path)
    reader = StoredReader(tmp_path)

    assert len(store.parts(tmp_path)["w"]) == 4
    for box in BOXES:
        assert torch.equal(reader.box("w", box), WEIGHT[box])
    reader.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_only_the_bytes_of_a_box_are_read_of_a_part(dtype, tmp_path, monkeypatch):
    weight = WEIGHT.to(dtype)
    store.save_weights(tmp_path, {"w": weight, "other": torch.ones(9)})
    reader = StoredReader(tmp_path)
    reader.box("w", (slice(0, 1), slice(0, 1), slice(0, 1)))  # finds where the numbers begin
    counts = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])

    assert torch.equal(reader.box("w", BOXES[1]), weight[BOXES[1]])
    assert sum(counts) == weight[BOXES[1]].numel() * dtype.itemsize


def test_a_part_whose_numbers_lie_otherwise_is_read_whole(tmp_path):
    """As torch stores a tensor that was transposed."""
    store.save_weights(tmp_path, {"w": WEIGHT.mT.contiguous().mT, "v": WEIGHT.bool()})
    reader = StoredReader(tmp_path)

    assert torch.equal(reader.box("w", BOXES[1]), WEIGHT[BOXES[1]])
    assert torch.equal(reader.box("v", BOXES[1]), WEIGHT.bool()[BOXES[1]])


def test_a_scalar_has_a_box(tmp_path):
    store.save_weights(tmp_path, {"n": torch.tensor(3.5)})
    assert StoredReader(tmp_path).box("n", ()) == 3.5


def test_damaged_bytes_of_a_part_are_said_to_be_in_one_line(tmp_path):
    store.save_weights(tmp_path, {"w": WEIGHT})
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"\1" * file.stat().st_size)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: w: the bytes of a tensor are damaged$"):
        StoredReader(tmp_path).box("w", BOXES[1])


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    """The pickle within a part, with the name of a function in it changed for another."""
    store.save_weights(tmp_path, {"w": WEIGHT})
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    assert content.count(b"_rebuild_tensor_v2") == 1
    file.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))
    with pytest.raises(ValueError, match="the bytes of a tensor are damaged"):
        StoredReader(tmp_path).box("w", BOXES[1])


def test_an_index_that_lacks_a_part_is_refused(tmp_path):
    from tests.checkpoint.test_store import _rewrite_index

    store.save_weights(tmp_path, {"w": WEIGHT})
    _rewrite_index(tmp_path, lambda index: index.storage_data.clear())
    with pytest.raises(ValueError, match="lacks the place of a part of w"):
        StoredReader(tmp_path)
