"""Stages and schedules against one process, and the layouts that they refuse."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ossature.checkpoint import store
from ossature.config import ParallelConfig
from ossature.model.config import GPT_OSS_20B, ModelConfig
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import inference
from ossature.parallel.stages import check_pipeline, stage_layers, stages_of
from ossature.sample.generate import generate
from ossature.train import prove
from ossature.train import step as steps
from ossature.train.evaluate import validate, validation_loader
from ossature.train.loop import train
from tests.parallel import parity
from tests.parallel.parity import DEEP, Layout, largest, worst
from tests.ranks import run_ranks
from tests.small_runs import records, small_run

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"]


def assert_equal(world: int, *axes: dict, shape: ModelConfig = DEEP, **changes) -> None:
    """Loss, router loss, norm, counts and gradients; weights after two steps of AdamW."""
    for errors in worst(world, [Layout(given, shape, changes) for given in axes]):
        weights = {name: e for name, e in errors.items() if name.startswith("weights ")}
        others = {name: e for name, e in errors.items() if name not in weights}
        assert largest(others) < (1e-5, "")
        # AdamW divides by the gradient: where that is nearly zero, its error is what counts.
        assert largest(weights) < (2e-4, "")


def test_every_schedule_finds_the_numbers_of_one_process():
    assert_equal(2, *({"pp": 2, "pp_schedule": schedule} for schedule in SCHEDULES))


def test_stages_of_shards_and_stages_of_split_rows_find_the_numbers_of_one_process():
    shards = {"pp": 2, "dp_shard": 2, "pp_schedule": "Interleaved1F1B"}
    assert_equal(4, shards, {"pp": 2, "cp": 2, "pp_schedule": "ZBVZeroBubble"})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_with_every_other_axis(schedule):
    axes = [{"cp": 2}, {"tp": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}]
    if schedule != "DualPipeV":  # it needs more micro-batches than two ranks have of 8 rows
        axes += [{"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1}, {"ep": 2}, {"etp": 2}]
    assert_equal(4, *({"pp": 2, "pp_schedule": schedule, **given} for given in axes))


@pytest.mark.slow
def test_four_stages_and_three_axes_find_the_numbers_of_one_process():
    assert_equal(4, {"pp": 4})
    axes = [{"tp": 2, "ep": 2, "dp_shard": 2}, {"tp": 2, "cp": 2}, {"dp_replicate": 2, "cp": 2}]
    assert_equal(8, *({"pp": 2, **given} for given in axes))


@pytest.mark.slow
def test_stages_that_compute_their_blocks_again_find_the_same():
    """As often as one rank does, which is part of the comparison."""
    schedules = [{"pp": 2, "pp_schedule": schedule} for schedule in SCHEDULES]
    assert_equal(2, *schedules, recompute="full")
    assert_equal(2, *schedules, recompute="selective")


@pytest.mark.slow
def test_bf16_stages_pass_bf16_activations_and_stay_near():
    (errors,) = worst(2, [Layout({"pp": 2}, DEEP, {"precision": "bf16"})])
    assert errors["loss"] < 2e-2
    assert 1e-4 < errors["gradients embedding.weight"] < 0.3


def _plant(_fault: str, patch: pytest.MonkeyPatch) -> None:
    """What is logged is what the rank found itself."""

    def all_reduce(x: torch.Tensor) -> None:
        if not x.is_floating_point():
            dist.all_reduce(x)

    patch.setattr(steps, "dist", SimpleNamespace(all_reduce=all_reduce))


def test_the_comparison_sees_a_loss_that_only_the_last_stage_knows():
    layout = Layout({"pp": 2}, DEEP, fault="the loss is not passed on")
    (errors,) = worst(2, [layout], _plant)
    assert errors["loss"] == 1.0 and errors["counts"] != 0.0
    assert errors["gradients embedding.weight"] < 1e-5


def _evaluate(rank: int, world: int, axes: list[dict]) -> list:
    found = []
    for given in axes:
        layout = Layout(given, DEEP)
        model, mesh, config, _pipeline = parity.built(layout, world)
        config = replace(config, eval=replace(config.eval, tokens=160))
        loss = validate(model, validation_loader(config, DEEP.vocab_size), mesh)
        with inference(model):
            text = generate(model, [[5, 6, 7], list(range(10, 30))], 8)
        found.append((loss, text.tolist(), sorted(name for name, _ in model.named_parameters())))
    return found


def test_validation_and_sampling_through_stages_say_what_one_process_says():
    alone = Transformer(DEEP)
    alone.load_state_dict(prove.drawn(DEEP))
    text = generate(alone, [[5, 6, 7], list(range(10, 30))], 8).tolist()
    axes = [{"pp": 2}, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}, {"cp": 2}, {"tp": 2}]
    ranks = run_ranks(2, _evaluate, axes)
    (((loss, *_),),) = run_ranks(1, _evaluate, [{}])
    for results in ranks:
        assert [result[1] for result in results] == [text] * len(axes)
        assert [result[0] for result in results] == pytest.approx([loss] * len(axes), rel=1e-5)
    names = set(prove.drawn(DEEP))
    for n in range(2):
        first, second = (set(results[n][2]) for results in ranks)
        assert first | second == names and not first & second


def _train(rank: int, world: int, config) -> None:
    train(config)


def test_a_run_through_stages_leaves_what_a_run_of_one_rank_leaves(tmp_path):
    """Metrics within 1e-4; and one rank goes on from the checkpoint of two."""
    common = {
        "model": "deep", "steps": 4, "eval__every_steps": 2, "eval__tokens": 64,
        "router__aux_loss": 0.02, "router__bias_update_rate": 1e-3,
    }  # fmt: skip
    alone = small_run(tmp_path / "alone", **common)
    staged = small_run(
        tmp_path / "staged", **common, parallel__pp=2, parallel__pp_schedule="Interleaved1F1B"
    )
    run_ranks(1, _train, alone)
    run_ranks(2, _train, staged)
    assert len(records(staged.run)) == 4
    for one, other in zip(records(alone.run), records(staged.run), strict=True):
        assert one.keys() == other.keys()
        for key in ("loss", "grad_norm", "router_loss", "validation_loss"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-4), key
        assert other["router"] == one["router"]
    newest = store.newest(staged.run)
    assert newest and set(store.list_weights(newest)) == set(prove.drawn(DEEP))
    run_ranks(1, _train, replace(staged, steps=5, parallel=ParallelConfig()))
    assert [record["step"] for record in records(staged.run)] == [1, 2, 3, 4, 5]
    run_ranks(2, _train, replace(staged, steps=6))
    assert records(staged.run)[-1]["step"] == 6


def test_the_head_weighs_as_much_as_the_blocks_it_is_worth():
    """The head of 20B has the matmul weights of 4.6 of its blocks."""
    assert [len(blocks) for blocks in stage_layers(GPT_OSS_20B, 4)] == [7, 7, 7, 3]


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8, 24])
def test_every_block_is_in_one_stage_and_every_stage_has_one(stages):
    ranges = stage_layers(GPT_OSS_20B, stages)
    assert [n for blocks in ranges for n in blocks] == list(range(24))
    assert len(ranges) == stages and all(ranges)


def test_v_schedules_put_the_first_and_the_last_stage_on_the_first_rank():
    config = ParallelConfig(pp=3, pp_schedule="DualPipeV")
    assert [stages_of(rank, config) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]
    loop = replace(config, pp_schedule="Interleaved1F1B", pp_chunks=3)
    assert stages_of(1, loop) == [1, 4, 7]


@pytest.mark.parametrize(
    ("axes", "layers", "micro_batches", "sentence"),
    [
        ({"pp": 4}, 3, 8, r"parallel.pp \(4\) .* at most num_hidden_layers \(3\)"),
        ({"pp": 2, "pp_chunks": 3, "pp_schedule": "Interleaved1F1B"}, 5, 8, r"\(2\) .* \(3\) .*5"),
        ({"pp": 4}, 8, 3, r"1F1B needs at least 4 micro-batches .* is 3"),
        ({"pp": 2, "pp_schedule": "DualPipeV"}, 8, 3, r"at least 4 micro-batches .* is 3"),
        ({"pp": 2, "pp_schedule": "Interleaved1F1B"}, 8, 5, r"\(5\) to be a multiple .* \(2\)"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused_with_both_numbers(
    tmp_path, axes, layers, micro_batches, sentence
):
    with pytest.raises(ValueError, match=sentence):
        check_pipeline(small_run(tmp_path, parallel=ParallelConfig(**axes)), layers, micro_batches)
