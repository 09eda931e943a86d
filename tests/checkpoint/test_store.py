"""Sharded folders of tensors: exact, whole, and never a way to run code."""

import os
import pickle

import pytest
import torch

from ossature.checkpoint import store


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "blocks.0.attention.q_proj.weight": torch.randn(6, 5, generator=g),
        "blocks.0.attention.sinks.weight": torch.randn(3, generator=g).bfloat16(),
        "step": torch.tensor(7.0),
    }


def test_tensors_come_back_bit_for_bit(tmp_path):
    store.save_weights(tmp_path / "a", tensors())
    filled = {name: torch.zeros_like(value) for name, value in tensors().items()}
    store.load_weights(tmp_path / "a", filled)
    for name, value in tensors().items():
        assert torch.equal(filled[name], value)
        assert torch.equal(store.read_weight(tmp_path / "a", name), value)


def test_the_index_alone_tells_shape_and_dtype(tmp_path):
    store.save_weights(tmp_path / "a", tensors())
    assert store.list_weights(tmp_path / "a") == {
        "blocks.0.attention.q_proj.weight": ((6, 5), torch.float32),
        "blocks.0.attention.sinks.weight": ((3,), torch.bfloat16),
        "step": ((), torch.float32),
    }


def test_values_are_cast_to_the_dtype_they_find(tmp_path):
    store.save_weights(tmp_path / "a", {"w": torch.tensor([1.0, 2.5])})
    target = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    store.load_weights(tmp_path / "a", target)
    assert target["w"].tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"w": (2, 3), "other": (1,)}, "has no tensor other"),
        ({}, "unexpected tensor w"),
        ({"w": (3, 2)}, r"w has shape \(2, 3\), expected \(3, 2\)"),
    ],
)
def test_names_and_shapes_must_be_exactly_those_asked_for(tmp_path, wanted, sentence):
    store.save_weights(tmp_path / "a", {"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=sentence):
        store.load_weights(tmp_path / "a", {n: torch.zeros(s) for n, s in wanted.items()})


class Attack:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_an_index_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"refused to load posix\.mkdir"):
        store.list_weights(tmp_path)
    assert not (tmp_path / "hacked").exists()


def _rewrite_index(folder, change):
    with (folder / ".metadata").open("rb") as file:
        index = pickle.load(file)
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path):
    store.save_weights(tmp_path / "a", {"w": torch.zeros(2)})

    def outside(index):
        for place in index.storage_data.values():
            place.relative_path = "../a/__0_0.distcp"

    _rewrite_index(tmp_path / "a", outside)
    with pytest.raises(ValueError, match="w lies outside the folder"):
        store.read_weight(tmp_path / "a", "w")


def test_a_file_cut_short_or_missing_is_named(tmp_path):
    store.save_weights(tmp_path / "a", {"w": torch.zeros(200)})
    file = tmp_path / "a" / "__0_0.distcp"
    os.truncate(file, 300)
    with pytest.raises(ValueError, match=r"__0_0\.distcp: cut short within w"):
        store.list_weights(tmp_path / "a")
    file.unlink()
    store._read_index.cache_clear()
    with pytest.raises(ValueError, match=r"__0_0\.distcp: missing"):
        store.list_weights(tmp_path / "a")


@pytest.mark.parametrize("junk", [b"", b"not a pickle", pickle.dumps([1, 2])])
def test_what_is_no_index_is_called_so(tmp_path, junk):
    (tmp_path / ".metadata").write_bytes(junk)
    with pytest.raises(ValueError, match="not an index of tensors"):
        store.list_weights(tmp_path)


def test_an_index_whose_objects_lack_a_field_is_called_so(tmp_path):
    """As one flipped bit in the name of the field does."""
    store.save_weights(tmp_path, {"w": torch.zeros(2)})
    index = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(index.replace(b"relative_path", b"relative_pbth"))
    with pytest.raises(ValueError, match=r"\.metadata: not an index of tensors: .*relative_path"):
        store.list_weights(tmp_path)


def test_damaged_bytes_are_said_to_be_in_one_line(tmp_path):
    """torch's own words would be how to load them all the same, and run what is in them."""
    store.save_weights(tmp_path, {"w": torch.zeros(2)})
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"\1" * file.stat().st_size)
    with pytest.raises(ValueError, match=r": the bytes of a tensor are damaged$"):
        store.read_weight(tmp_path, "w")


def test_the_index_does_not_tell_where_it_was_written(tmp_path):
    store.save_weights(tmp_path / "a", {"w": torch.zeros(2)})
    assert str(tmp_path).encode() not in (tmp_path / "a" / ".metadata").read_bytes()


def test_the_newest_checkpoint_is_the_last_whole_step(tmp_path):
    assert store.newest(tmp_path) is None
    for name in ("step_00000090", "step_00000100", "step_00000110.partial"):
        store.save_weights(tmp_path / "checkpoints" / name, {"w": torch.zeros(2)})
    (tmp_path / "checkpoints" / "step_00000120").mkdir()  # no index: nothing in it
    found = store.newest(tmp_path)
    assert found == tmp_path / "checkpoints" / "step_00000100"
    assert store.step_of(found) == 100
