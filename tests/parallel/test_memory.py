"""What a step holds, by formula: against numbers by hand, and against the tensors of real steps."""

from dataclasses import replace
from pathlib import Path

import pytest

from ossature.config import ParallelConfig, TrainConfig
from ossature.model.config import ModelConfig
from ossature.model.flops import parameters
from ossature.parallel import mesh as meshes
from ossature.parallel.activations import attention, moe
from ossature.parallel.gathering import GATHERED
from ossature.parallel.memory import STATES, WEIGHTS, Use, walks
from ossature.parallel.orders import actions
from ossature.parallel.shards import part
from ossature.parallel.sizes import KEPT, Ledger, Sizes
from ossature.train import optim, peak, setup
from tests.ranks import run_ranks
from tests.small_runs import small_run

WIDE = ModelConfig(
    vocab_size=1536,
    hidden_size=192,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=64,
    eos_token_id=None,
    pad_token_id=None,
)
"""Wide and short enough that activations and weights both count."""


def run_of(axes: dict, **changes) -> TrainConfig:
    """Rows of 256 tokens, 2 a micro-batch, 2 micro-batches on each of two data ranks."""
    changes = {
        "data__seq_len": 256, "micro_batch_tokens": 512, "global_batch_tokens": 2048, **changes,
    }  # fmt: skip
    return small_run(Path("unused"), parallel=ParallelConfig(**axes), **changes)


def planned(config: TrainConfig, world: int, shape: ModelConfig = WIDE) -> list[Use]:
    sizes = meshes.sizes(config.parallel, world)
    model = setup.whole_model(config, shape)
    found = walks(
        model, config, sizes, "cpu", lambda n, p: optim.state_bytes(config.optim, n, p)
    )  # fmt: skip
    return [walk.use() for walk in found]


def _measure(_rank: int, world: int, configs: list[TrainConfig]) -> list[int]:
    return [peak.measure(config, WIDE, world) for config in configs]


def errors(world: int, configs: list[TrainConfig]) -> list[float]:
    """Of the peak of the rank that has most, by layout; positive where the plan says more."""
    measured = run_ranks(world, _measure, configs, seconds=170)
    found = []
    for config, peaks in zip(configs, zip(*measured, strict=True), strict=True):
        most = max(use.peak for use in planned(config, world))
        found.append(most / max(peaks) - 1)
    return found


def test_weights_gradients_and_moments_are_four_eight_bytes_a_parameter_on_one_rank():
    config = run_of({}, global_batch_tokens=512)
    walk = planned(config, 1)[0].at_peak
    count = parameters(WIDE)

    assert walk[WEIGHTS] == 4 * count
    assert walk[STATES] == 8 * count
    assert walk[GATHERED] <= 4 * count


def test_an_axis_leaves_its_share_of_what_it_splits():
    axes = ParallelConfig(tp=2, ep=4, etp=2)

    assert part("blocks.0.attention.q_proj.weight", (256, 192), axes) == (128, 192)
    assert part("blocks.0.attention.o_proj.weight", (192, 256), axes) == (192, 128)
    assert part("blocks.0.attention.o_proj.bias", (192,), axes) == (192,)
    assert part("blocks.0.moe.experts.gate_up_weight", (8, 320, 192), axes) == (2, 160, 192)
    assert part("blocks.0.moe.experts.down_weight", (8, 192, 160), axes) == (2, 192, 80)
    assert part("blocks.0.moe.experts.down_bias", (8, 192), axes) == (2, 192)
    assert part("blocks.0.moe.router.weight", (8, 192), axes) == (8, 192)
    assert part("lm_head.weight", (97, 192), axes) == (49, 192)  # the first rank has one more


def test_what_a_block_keeps_by_hand():
    """One row of 256 tokens in fp32, full attention: every tensor autograd saves, by its shape."""
    config = run_of({}, micro_batch_tokens=256)
    sizes = Sizes(config, replace(WIDE, sliding_window=256), "cpu")
    tokens, hidden, q, k, experts, chosen, inner = 256, 192, 256, 128, 8, 2, 160
    m = Ledger()
    attention(m, sizes, 0)
    normed = tokens * (hidden + 1)  # with its scale
    heads = tokens * (2 * q + 2 * k + 8)  # q, out, k, v, logsumexp of 8 heads

    assert m.held[KEPT] == 4 * (normed + heads + tokens * hidden)

    m = Ledger()
    moe(m, sizes)
    scores = tokens * (3 * experts + 2)  # and what z takes
    rows = tokens * chosen
    sorted_rows = rows * (hidden + 2 * inner + 1) + rows * 2  # gate, up, weights; an int64 order
    choice = rows * 3  # an int64 number and a weight

    assert m.held[KEPT] == 4 * (normed + scores + sorted_rows + choice + tokens * hidden)


def test_a_schedule_says_how_many_micro_batches_wait_for_their_backward():
    def most(schedule: str, rank: int) -> int:
        waiting = found = 0
        axes = ParallelConfig(pp=3, pp_schedule=schedule)  # type: ignore[arg-type]
        for action in actions(axes, rank, 8):
            waiting += {"F": 1, "B": -1, "R": 0}[action.kind]
            found = max(found, waiting)
        return found

    assert [most("GPipe", rank) for rank in range(3)] == [8, 8, 8]
    assert [most("1F1B", rank) for rank in range(3)] == [3, 2, 1]


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_every_stage_of_a_schedule_goes_there_and_back_once_a_micro_batch(schedule):
    axes = ParallelConfig(pp=2, pp_schedule=schedule)
    done = [(a.kind, a.stage, a.micro_batch) for rank in (0, 1) for a in actions(axes, rank, 4)]
    backward = [(stage, n) for kind, stage, n in done if kind in ("B", "W")]

    assert sorted((stage, n) for kind, stage, n in done if kind == "F") == sorted(backward)
    assert sorted(backward) == [(stage, n) for stage in range(4) for n in range(4)]
    assert sorted(stage for kind, stage, _ in done if kind == "R") == [0, 1, 2, 3]


def test_experts_that_do_not_divide_fill_up_every_shard():
    """8 experts over 3 ranks, with the rest of the block: 3 of them on each."""
    one = planned(run_of({}, global_batch_tokens=512), 1)[0].at_peak[WEIGHTS]
    three = planned(run_of({}, global_batch_tokens=1536), 3)[0].at_peak[WEIGHTS]

    assert three > one / 3 * 1.05


def test_a_plan_is_within_ten_percent_of_the_measured_peak():
    (error,) = errors(2, [run_of({"dp_shard": 2})])

    assert abs(error) < 0.1


LAYOUTS = [
    (2, run_of({"tp": 2, "ep": 2}, recompute="selective")),
    (2, run_of({"cp": 2}, precision="bf16")),
    (2, run_of({"pp": 2, "pp_schedule": "ZBVZeroBubble"})),
    (2, run_of({"ep": 2}, recompute="full", precision="bf16")),
    (4, run_of({"dp_replicate": 2, "etp": 2}, optim__states="bf16")),
    (4, run_of({"pp": 2, "tp": 2}, precision="bf16", global_batch_tokens=4096)),
    (2, run_of({"reshard_after_forward": "never"})),
    (2, run_of({"reduce_dtype": "bf16"}, precision="bf16")),
    (2, run_of({"reduce_every_micro_batch": True, "ep": 2})),
    (2, run_of({"prefetch_blocks": 2})),
    (4, run_of({"pp": 2, "reshard_after_forward": "always", "prefetch_blocks": 1})),
]


@pytest.mark.slow
def test_plans_of_emulated_products_in_8_bits_are_within_ten_percent():
    runs = [
        run_of({}, float8="rowwise", float8_emulate=True, precision="bf16"),
        run_of({}, float8="tensorwise", float8_emulate=True),
        run_of({"ep": 2}, float8="mxfp8", float8_emulate=True, precision="bf16"),
        run_of({"tp": 2}, float8="tensorwise", float8_emulate=True, precision="bf16"),
    ]
    found = errors(2, runs)

    assert max(map(abs, found)) < 0.1, found


@pytest.mark.slow
def test_plans_of_one_rank_that_steps_in_backward_are_within_ten_percent():
    lean = {
        "optim__in_backward": True, "optim__clip": 0.0, "global_batch_tokens": 512,
        "precision": "bf16", "optim__weights": "bf16",
    }  # fmt: skip
    runs = [run_of({}, **lean), run_of({}, **lean, optim__states="8bit", recompute="full")]
    found = errors(1, runs)

    assert max(map(abs, found)) < 0.1, found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_plans_of_many_layouts_are_within_ten_percent(world):
    configs = [config for ranks, config in LAYOUTS if ranks == world]
    found = errors(world, configs)

    assert max(map(abs, found)) < 0.1, found


@pytest.mark.parametrize("changes", [
    {},
    {"precision": "bf16"},
    {"precision": "bf16", "recompute": "full", "global_batch_tokens": 512},
    {"precision": "bf16", "optim__weights": "bf16", "optim__states": "bf16"},
])  # fmt: skip
def test_one_rank_has_no_buffers_of_collectives(changes):
    """fp32 masters are what is computed with, or have copies in bf16 that stay."""
    (error,) = errors(1, [run_of({}, **changes)])
    assert abs(error) < 0.08, f"{error:+.1%}"
