"""Products beside transfers (async TP) against one process, and torch's operators against ours."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ossature.config import ParallelConfig
from ossature.parallel import overlap
from tests.parallel import parity
from tests.parallel.parity import TINY, Layout
from tests.parallel.test_tensor import check
from tests.ranks import run_ranks
from tests.small_runs import small_run


def test_two_ranks_that_overlap_find_what_one_process_finds():
    check(
        2,
        [
            Layout({"tp": 2, "async_tp": True}),
            Layout({"tp": 2, "async_tp": True}, replace(TINY, vocab_size=97)),
        ],
    )


@pytest.mark.slow
def test_overlap_with_other_axes_finds_what_one_process_finds():
    layouts = [
        Layout({"tp": 2, "dp_shard": 2, "async_tp": True}),
        Layout({"tp": 2, "cp": 2, "async_tp": True}),
        Layout({"tp": 2, "pp": 2, "ep": 2, "async_tp": True}, parity.DEEP),
        Layout({"tp": 2, "dp_shard": 2, "async_tp": True}, changes={"recompute": "selective"}),
    ]
    check(4, layouts)


def plant(fault: str, patch: pytest.MonkeyPatch):
    if fault == "the gradient of the bias is a rank's own":
        patch.setattr(overlap, "sum_gradient", lambda bias, group: bias)
    else:
        patch.setattr(overlap, "_multiply_and_scatter", own_term)
    return None


def own_term(x: torch.Tensor, matrix: torch.Tensor, group) -> torch.Tensor:
    return (x @ matrix).chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]


def test_faults_in_the_overlap_are_seen():
    faults = ["the gradient of the bias is a rank's own", "terms of other ranks are left out"]
    layouts = [Layout({"tp": 2, "async_tp": True}, fault=fault) for fault in faults]
    for layout, errors in zip(layouts, parity.worst(2, layouts, plant), strict=True):
        assert parity.largest(errors) > (1e-2, ""), layout.fault


def test_the_operators_of_torch_compute_what_a_cpu_computes():
    """Shapes, strides, order of arguments: by torch's own fallback, as operators of the CPU."""
    run_ranks(2, call_operators)


def call_operators(rank: int, world: int) -> None:
    from torch.distributed import _symmetric_memory as memory

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", memory._fused_matmul_reduce_scatter_fallback, "CPU")
    group = dist.group.WORLD
    draw = torch.Generator().manual_seed(rank)
    random = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    x, heads = random(2, 3, 5), random(2, 6, 4)
    q, k, o = random(8, 5), random(2, 5), random(5, 4)
    dq, dk, do = random(2, 6, 8), random(2, 6, 2), random(2, 3, 5)

    def results() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, q, k, heads, o)]
        own, a, b, inner, out = leaves
        products = overlap.gather_multiply(own, a, b, group=group)
        part = overlap.multiply_scatter(inner, out, group=group)
        torch.autograd.backward([*products, part], [dq, dk, do])
        return [*products, part, *(leaf.grad for leaf in leaves)]

    ours = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_has_operators", lambda _: True)
        theirs = results()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": ParallelConfig(async_tp=True)}, "needs parallel.tp of 2 or more"),
        ({"float8": "tensorwise", "precision": "bf16"}, "must be false with float8"),
        ({"lora__rank": 4, "init": Path("model")}, "must be false with lora.rank"),
    ],
)
def test_what_cannot_overlap_is_refused(tmp_path, changes, words):
    changes = {"parallel": ParallelConfig(tp=2, async_tp=True)} | changes
    with pytest.raises(ValueError, match=words):
        small_run(tmp_path, **changes)
