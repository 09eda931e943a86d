"""Ranks -> axes: which layouts exist, and what is said of those that do not."""

import pytest

from ossature.config import ParallelConfig
from ossature.parallel import mesh as meshes
from ossature.parallel.launch import environment
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("given", "world", "replicate", "shard"),
    [
        ({}, 1, 1, 1),
        ({}, 8, 1, 8),
        ({"dp_replicate": 2}, 8, 2, 4),
        ({"dp_replicate": 4, "dp_shard": 1}, 4, 4, 1),
        ({"dp_shard": 3}, 3, 1, 3),
    ],
)
def test_dp_shard_takes_the_ranks_left_over(given, world, replicate, shard):
    sizes = meshes.sizes(ParallelConfig(**given), world)
    assert (sizes["dp_replicate"], sizes["dp_shard"]) == (replicate, shard)
    assert list(sizes) == ["pp", "dp_replicate", "dp_shard", "cp", "tp"]


@pytest.mark.parametrize(
    ("given", "world", "sentence"),
    [
        ({"dp_replicate": 3}, 8, r"dp_replicate \(3\).* must divide the number of ranks \(8\)"),
        ({"dp_shard": 2}, 3, r"dp_shard \(2\) must be the number of ranks \(3\)"),
        ({"dp_replicate": 2, "dp_shard": 2}, 2, r"must be the number of ranks \(2\)"),
    ],
)
def test_an_impossible_layout_is_refused_with_both_numbers(given, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        meshes.sizes(ParallelConfig(**given), world)


def _data_ranks(rank: int, world: int) -> tuple:
    mesh = meshes.build(meshes.sizes(ParallelConfig(dp_replicate=2), world), "cpu")
    import torch

    total = meshes.sum_over_data(torch.tensor([rank + 1]), mesh)
    return meshes.data_rank(mesh), int(total), meshes.fsdp_mesh(meshes.dense_view(mesh)).shape


def test_every_rank_reads_rows_of_its_own_and_sums_count_each_once():
    results = run_ranks(4, _data_ranks)
    assert [r[0] for r in results] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert {r[1] for r in results} == {1 + 2 + 3 + 4}
    assert results[0][2] == (2, 2)


def test_an_environment_that_is_half_set_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"RANK \(not set\) must be a whole number, since WORLD"):
        environment()
