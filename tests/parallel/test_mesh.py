"""Ranks -> axes: which layouts exist, and what is said of those that do not."""

from dataclasses import replace

import pytest

from ossature.config import ParallelConfig
from ossature.parallel import mesh as meshes
from tests.ranks import run_ranks
from tests.small_runs import TINY


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
        ({"tp": 3}, 8, r"tp \(3\) must divide the number of ranks \(8\)"),
        ({"pp": 2, "cp": 2, "tp": 2}, 4, r"pp \(2\) .* must divide the number of ranks \(4\)"),
        ({"ep": 8}, 4, r"ep \(8\) x etp \(1\) must divide dp_shard x cp x tp \(4\)"),
        ({"ep": 2, "etp": 2, "pp": 2}, 4, r"ep \(2\) x etp \(2\) must divide .* \(2\)"),
        ({"ep": 2, "dp_replicate": 4}, 4, r"ep \(2\) x etp \(1\) must divide .* \(1\)"),
    ],
)
def test_an_impossible_layout_is_refused_with_both_numbers(given, world, sentence):
    with pytest.raises(ValueError, match=sentence):
        meshes.sizes(ParallelConfig(**given), world)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tp": 4}, r"parallel.tp \(4\) must divide num_key_value_heads \(2\)"),
        ({"ep": 3}, r"parallel.ep \(3\) must divide num_local_experts \(8\)"),
        ({"etp": 64}, r"parallel.etp \(64\) must divide intermediate_size \(32\)"),
        ({"cp": 3}, r"parallel.2 x cp \(6\) must divide data.seq_len \(32\)"),
        ({"tp": 2, "cp": 16}, None),
        ({"tp": 2, "ep": 8, "etp": 32}, None),
    ],
)
def test_a_layout_that_the_model_cannot_have_is_refused_with_both_numbers(given, sentence):
    if sentence is None:
        meshes.check_model(ParallelConfig(**given), TINY, seq_len=32)
        return
    with pytest.raises(ValueError, match=sentence):
        meshes.check_model(ParallelConfig(**given), TINY, seq_len=32)


def test_a_vocabulary_of_which_a_rank_would_have_no_row_is_refused():
    wide = replace(TINY, num_attention_heads=8, num_key_value_heads=4)
    for size, ranks in [(5, 4), (1, 2)]:  # parts of 2, 2, 1 and none
        line = rf"parallel.tp \({ranks}\) must leave every rank a row of vocab_size \({size}\)"
        with pytest.raises(ValueError, match=line):
            meshes.check_model(ParallelConfig(tp=ranks), replace(wide, vocab_size=size), 32)
    for size in (4, 7, 97):
        meshes.check_model(ParallelConfig(tp=4), replace(wide, vocab_size=size), 32)


def _views(rank: int, world: int) -> tuple:
    """Ranks that share a weight's shards, an expert's shards, the experts, and one expert."""
    config = ParallelConfig(dp_replicate=2, cp=2, tp=2, ep=2, etp=2)
    mesh = meshes.build(meshes.sizes(config, world), "cpu")
    dense, experts = meshes.dense_view(mesh), meshes.expert_view(mesh, config)
    return tuple(
        view.mesh.tolist()
        for view in (
            meshes.fsdp_mesh(dense), dense["tp"],
            meshes.fsdp_mesh(experts), experts["ep"], experts["etp"],
        )
    )  # fmt: skip


def test_the_views_deal_out_the_same_ranks():
    """By hand: 8 ranks, two copies of dp_shard 1 x cp 2 x tp 2 = efsdp 1 x ep 2 x etp 2."""
    results = run_ranks(8, _views)
    assert results[0] == ([[0, 2], [4, 6]], [0, 1], [[0], [4]], [0, 2], [0, 1])
    assert results[7] == ([[1, 3], [5, 7]], [6, 7], [[3], [7]], [5, 7], [6, 7])


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
