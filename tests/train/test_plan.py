"""`ossature plan`: verdicts, refusals, searches, and the formulas against the code that divides."""

from pathlib import Path

import pytest

from ossature import cli
from ossature.config import DataConfig, ParallelConfig, TrainConfig
from ossature.model.config import GPT_OSS_20B
from ossature.model.flops import matmul_parameters, parameters
from ossature.train import plan as plans
from ossature.train import setup
from ossature.train.plan_command import parse_bytes
from tests.small_runs import TINY, small_run

ARGV = ["--run", "unused", "--data.mock", "--log.tensorboard", "false"]


def planned(capsys, *words: str) -> tuple[int, str]:
    status = cli.main(["plan", *ARGV, *words])
    return status, "".join(capsys.readouterr())


def test_bytes_are_read_with_their_unit():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("141GB") == 141 * 10**9
    assert parse_bytes("1.5 TiB") == 3 * 2**39
    for wrong in ("80", "GiB", "80Gb", "-1GB", "0GB"):
        with pytest.raises(ValueError, match=r"^memory = .* must be a number and a unit"):
            parse_bytes(wrong)


def test_the_whole_optimizer_of_20b_does_not_fit_one_device(capsys):
    """Weights and moments alone take 12 bytes a parameter: 251 GB."""
    status, text = planned(capsys, "--model", "20b", "--ranks", "1", "--memory", "80GiB")
    found = plans.plan(run_of_20b(), 1, "cuda").worst.peak

    assert status == 1 and "does not fit" in text
    assert found > 12 * parameters(GPT_OSS_20B)


def run_of_20b(**axes) -> TrainConfig:
    return TrainConfig(
        run=Path("unused"), model="20b", data=DataConfig(mock=True),
        parallel=ParallelConfig(**axes),
    )  # fmt: skip


def test_a_layout_that_fits_says_what_is_left(capsys):
    words = ["--model", "debug", "--ranks", "2", "--memory", "80GiB"]
    status, text = planned(capsys, *words)

    assert status == 0
    assert "GiB left of 80.0" in text


def test_an_impossible_layout_is_refused_in_the_words_of_training(capsys):
    words = ["--model", "debug", "--ranks", "4", "--parallel.tp", "4"]
    status, text = planned(capsys, *words)

    assert status == 2
    assert text == "error: parallel.tp (4) must divide num_key_value_heads (2)\n"


@pytest.mark.parametrize(
    ("world", "changes", "sentence"),
    [
        (
            2, {"optim__states": "8bit", "parallel": ParallelConfig(tp=2)},
            "optim.states = 8bit: a rank's part of blocks.0.attention.o_proj.weight (64, 96) has "
            "rows of 48, which must be a multiple of 32; split fewer ways",
        ),
        (
            32, {"optim__states": "8bit", "parallel": ParallelConfig(tp=2), "lora__rank": 2,
                 "lora__targets": ("down",), "lora__dora": True},
            "optim.states = 8bit: a rank's part of blocks.0.moe.experts.down_lora_magnitude "
            "(8, 64) has rows of 2, which must be a multiple of 32; split fewer ways",
        ),
        (
            2, {"float8": "mxfp8", "float8_emulate": True, "parallel": ParallelConfig(etp=2)},
            "float8 = mxfp8 needs intermediate_size / etp (16) to be a multiple of 32",
        ),
        (
            2, {"lora__rank": 2, "lora__base": "mxfp4", "parallel": ParallelConfig(etp=2)},
            "lora.base = mxfp4 needs intermediate_size (32) to be a multiple of 32 x parallel.etp "
            "(2)",
        ),
    ],
)  # fmt: skip
def test_what_training_refuses_a_plan_refuses_in_the_same_words(world, changes, sentence):
    run = small_run(
        Path("unused"), global_batch_tokens=2048, micro_batch_tokens=64, precision="bf16",
        **changes,
    )  # fmt: skip
    with pytest.raises(ValueError) as planned:
        plans.plan(run, world, "cuda")
    with pytest.raises(ValueError) as trained:
        sizes, shape = setup.check_layout(run, world)
        plans.made(run, sizes, shape, 0, world)
    assert str(planned.value) == str(trained.value) == sentence


def test_products_in_8_bits_are_planned_for_devices_that_have_them():
    run = small_run(Path("unused"), float8="rowwise", precision="bf16")
    assert plans.plan(run, 1, "cuda").worst.peak
    with pytest.raises(ValueError, match="float8 = rowwise needs a CUDA device"):
        plans.plan(run, 1, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"offload_activations": True},
        {"compile": True},
        {"parallel__reduce_every_micro_batch": True},
        {"optim__in_backward": True, "optim__clip": 0.0, "global_batch_tokens": 64,
         "micro_batch_tokens": 64},
    ],
)  # fmt: skip
def test_a_search_passes_over_what_does_not_go_with_the_other_keys(changes):
    run = small_run(Path("unused"), **changes)
    world = 1 if run.optim.in_backward else 2
    found, _ = plans.search(run, world, "cuda", 2**40)

    assert found
    for entry in found:
        assert entry.plan.config.offload_activations == run.offload_activations
        assert entry.plan.config.compile == run.compile


@pytest.mark.parametrize("schedule", ["GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_the_schedule_of_a_pipeline_that_there_is_not_changes_no_plan(schedule):
    def peak(schedule) -> float:
        axes = ParallelConfig(pp_schedule=schedule)
        run = small_run(Path("unused"), parallel=axes, global_batch_tokens=256)
        (made,) = plans.dry_run(run, 2)
        assert made.equal, made
        return plans.plan(run, 2, "cuda").worst.peak

    assert peak(schedule) == peak("1F1B")


def test_work_counts_frozen_matrices_once_less_and_a_forward_pass_more_if_computed_again():
    def work(recompute, **lora) -> float:
        run = small_run(Path("unused"), recompute=recompute, **lora)
        return plans.plan(run, 1, "cuda").flops

    lora = {"lora__rank": 2, "lora__targets": ("q_proj",)}
    once, again = work("none", **lora), work("full", **lora)
    whole = work("none")
    adapters = 2 * 2 * 2 * (64 + 96) * 128  # of the forward pass: rank 2 in 2 layers, 128 tokens
    matrices = 2 * matmul_parameters(TINY) * 128

    assert work("full") == pytest.approx(whole * 4 / 3)
    assert once == pytest.approx(whole - matrices + 3 * adapters)
    assert again - once == pytest.approx(whole / 3 + adapters)


def test_a_search_lists_layouts_that_fit_and_the_fastest_first():
    config = small_run(Path("unused"))
    found, _ = plans.search(config, 2, "cuda", 2**40)
    times = [entry.time.total for entry in found]

    assert times == sorted(times) and len(times) > 2
    assert found[0].plan.config.recompute == "none"
    least = min(entry.plan.worst.peak for entry in found)
    fewer, _ = plans.search(config, 2, "cuda", least)
    assert fewer and all(entry.plan.worst.peak <= least for entry in fewer)
    assert plans.search(config, 2, "cuda", least / 100)[0] == []


def test_less_memory_is_asked_where_blocks_are_computed_again():
    def most(mode) -> float:
        run = small_run(Path("unused"), recompute=mode)
        return plans.plan(run, 1, "cuda").worst.peak

    assert most("full") < most("selective") < most("none")


def at_peak(axes: dict, **changes) -> dict[str, float]:
    """By what bytes are for, on a CUDA device, of one of two ranks."""
    run = small_run(Path("unused"), parallel=ParallelConfig(**axes), **changes)
    return plans.plan(run, 2, "cuda").worst.at_peak


def test_what_is_moved_to_the_host_is_not_on_the_device():
    plain, moved = at_peak({}), at_peak({"cpu_offload": True})

    assert plain["weights"] and plain["optimizer states"]
    assert not moved.get("weights") and not moved.get("optimizer states")
    assert at_peak({}, offload_activations=True)["activations"] < plain["activations"] / 2


def test_options_of_fsdp_change_what_a_plan_counts():
    def received(**axes) -> float:
        run = small_run(Path("unused"), parallel=ParallelConfig(**axes), global_batch_tokens=256)
        return plans.plan(run, 2, "cuda").traffic["fsdp"]

    always, never = received(), received(reshard_after_forward="never")
    micro = {"global_batch_tokens": 256}

    assert always > 2 * never  # two micro-batches, blocks gathered twice each
    assert received(reduce_every_micro_batch=True) > always > received(reduce_dtype="bf16")
    held = [
        at_peak(axes, **micro)["gradients, whole"]
        for axes in ({}, {"reduce_dtype": "bf16"}, {"reduce_every_micro_batch": True})
    ]
    assert held == sorted(held, reverse=True) and len(set(held)) == 3


LAYOUTS = [
    {},
    {"tp": 2, "ep": 4, "dp_replicate": 2},
    {"pp": 2, "cp": 2, "etp": 2},
    {"ep": 8, "tp": 2, "etp": 2},
]


@pytest.mark.parametrize("axes", LAYOUTS)
def test_the_code_that_divides_makes_as_many_bytes_as_the_formulas(axes):
    run = small_run(
        Path("unused"), parallel=ParallelConfig(**axes), global_batch_tokens=32 * 64 * 2
    )
    made = plans.dry_run(run, 64)

    assert len(made) == run.parallel.pp and all(rank.equal for rank in made), made


def test_adapters_and_packed_weights_are_counted_as_they_are_made():
    run = small_run(
        Path("unused"), lora__rank=4, lora__base="mxfp4", parallel=ParallelConfig(ep=2),
        optim__states="8bit",
    )  # fmt: skip
    (made,) = plans.dry_run(run, 4)

    assert made.equal, made
