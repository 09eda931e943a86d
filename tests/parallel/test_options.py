"""Ways of sharding weights and reducing gradients that change no number, against one process."""

from pathlib import Path

import pytest

from ossature.config import ParallelConfig
from ossature.train import prove
from ossature.train import step as steps
from tests.parallel import parity
from tests.parallel.parity import DEEP, Layout
from tests.parallel.test_fsdp import Communication
from tests.parallel.test_tensor import check
from tests.ranks import run_ranks
from tests.small_runs import small_run

DDP = {"dp_replicate": 2, "dp_shard": 1}
EVERY = {"reduce_every_micro_batch": True}


def test_every_way_of_sharding_finds_what_one_process_finds():
    layouts = [
        Layout(DDP),
        Layout({"reshard_after_forward": "always", **EVERY}),
        Layout({"reshard_after_forward": "never", "prefetch_blocks": 1}),
        Layout({"prefetch_blocks": 2, "cpu_offload": True}),
        Layout(changes={"offload_activations": True, "recompute": "full"}),
    ]
    check(2, layouts)


@pytest.mark.slow
def test_four_ranks_find_what_one_process_finds():
    layouts = [
        Layout({"dp_replicate": 2, **EVERY, "prefetch_blocks": 3, "ep": 2}, DEEP),
        Layout({"dp_replicate": 4, "dp_shard": 1, "ep": 1}),
        Layout({"tp": 2, "ep": 2, "prefetch_blocks": 9, "cpu_offload": True}),
        Layout({"pp": 2, "reshard_after_forward": "always", "prefetch_blocks": 1}, DEEP),
        Layout({"pp": 2, "cpu_offload": True, "pp_schedule": "ZBVZeroBubble"}, DEEP),
        Layout({"cp": 2, "reshard_after_forward": "never", **EVERY, "ep": 4}),
        Layout({"cp": 2, "tp": 2, "ep": 2}, changes={"offload_activations": True}),
        Layout({"pp": 2, "pp_schedule": "ZBVZeroBubble"}, DEEP, {"offload_activations": True}),
    ]
    check(4, layouts)


def plant(fault: str, patch: pytest.MonkeyPatch):
    if fault == "copies left gathered over the optimizer's step":
        patch.setattr(steps, "release", lambda model: None)
    else:
        assert fault == "a reduction for each micro-batch"
        asked = steps.reduce_gradients_now
        each = lambda model, _last, axes: asked(model, True, axes)  # noqa: E731
        patch.setattr(steps, "reduce_gradients_now", each)


FAULTS = {
    "copies left gathered over the optimizer's step": "weights lm_head.weight",
    "a reduction for each micro-batch": "gradients are reduced 2 times a step, not 1",
}


def test_the_comparison_sees_planted_faults():
    layouts = [Layout({"reshard_after_forward": "never"}, fault=fault) for fault in FAULTS]
    for layout, errors in zip(layouts, parity.worst(2, layouts, plant), strict=True):
        assert not errors[FAULTS[layout.fault]] < 1e-3, (layout.fault, parity.largest(errors))


def _collectives(rank: int, world: int, many: list[dict]) -> list[tuple]:
    """How often each kind of collective runs in a step of 8 / world micro-batches; and dtypes that
    are reduced."""
    out = []
    for axes in many:
        layout = Layout(axes, changes={"micro_batch_tokens": 32})
        model, mesh, config, _ = parity.built(layout, world)
        with Communication() as seen:
            steps.accumulate(
                model,
                parity.mine(layout, mesh),
                10,
                mesh,
                config.router,
                log_router=False,
                axes=config.parallel,
            )
        kinds = ("allgather", "reduce_scatter", "allreduce")
        counts = [sum(kind in call for call in seen.calls) for kind in kinds]
        out.append((*counts, {str(d) for name, d in seen.dtypes if "reduce_scatter" in name}))
    return out


GROUPS = 3
"""Two blocks, and the root."""


def test_each_option_communicates_as_often_as_it_says():
    """Four micro-batches; the sum of the loss over all ranks is one all-reduce more."""
    each = 4 * (2 * 2 + 1)  # blocks twice, the root once, for each micro-batch
    counts = {  # gathers, scatters, sums over copies
        "by default": ({}, each, GROUPS, 0),
        "never": ({"reshard_after_forward": "never"}, GROUPS, GROUPS, 0),
        "every": (EVERY, each, 4 * GROUPS, 0),
        "copies": (DDP, 0, 0, GROUPS),
    }
    found = run_ranks(2, _collectives, [axes for axes, *_ in counts.values()])[0]
    for (_, gathers, scatters, sums), calls, name in zip(
        counts.values(), found, counts, strict=True
    ):
        assert calls[:3] == (gathers, scatters, sums + 1), name


@pytest.mark.slow
def test_copies_of_shards_are_added_up_once_a_step():
    """And scattered after each of the two micro-batches."""
    ((_, scatters, sums, _),) = run_ranks(4, _collectives, [{"dp_replicate": 2, **EVERY}])[0]
    assert (scatters, sums) == (2 * GROUPS, GROUPS + 1)


def _rounded(rank: int, world: int) -> tuple[set, dict[str, float]]:
    layout = Layout({"reduce_dtype": "bf16"})
    found = prove.find(layout.case(), world)
    true = prove.reference(layout.case().alone())
    errors = {n: prove.relative(g, true.gradients[n]) for n, g in found.gradients.items()}
    return _collectives(rank, world, [layout.axes])[0][3], errors


def test_bf16_reductions_round_each_term_of_a_gradient():
    """Each rounding is off by at most 2 ** -9.  There are seven: two micro-batches and their sum
    on each of two ranks, and the sum of the ranks."""
    for dtypes, errors in run_ranks(2, _rounded):
        assert dtypes == {"torch.bfloat16"}
        assert max(errors.values()) < 7 * 2**-9
        assert max(errors.values()) > 2**-11  # it is not fp32


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"offload_activations": True, "recompute": "selective"},
            "offload_activations (True) goes with recompute none or full, not selective: ",
        ),
        (
            {"offload_activations": True, "compile": True},
            "offload_activations (True) must be false with compile: ",
        ),
        (
            {"parallel": ParallelConfig(pp=2, reduce_every_micro_batch=True)},
            "parallel.reduce_every_micro_batch (True) must be false with parallel.pp (2)",
        ),
        (
            {
                "parallel": ParallelConfig(cpu_offload=True),
                "optim__in_backward": True,
                "optim__clip": 0.0,
                "micro_batch_tokens": 128,
            },
            "optim.in_backward: parallel.cpu_offload (True) must be false",
        ),
    ],
)
def test_what_cannot_be_is_refused(change, line):
    with pytest.raises(ValueError, match="^" + line.replace("(", r"\(").replace(")", r"\)")):
        small_run(Path("unused"), **change)
