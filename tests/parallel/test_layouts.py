"""Three and more axes at once against one process, and what bf16 changes."""

import pytest
import torch

from ossature.train import prove
from ossature.train import step as steps
from ossature.train.prove import whole
from tests.parallel import parity
from tests.parallel.parity import DEEP, Layout
from tests.parallel.test_fsdp import Communication
from tests.parallel.test_tensor import check
from tests.ranks import run_ranks


@pytest.mark.slow
def test_four_ranks_of_many_axes_find_what_one_process_finds():
    layouts = [
        Layout({"cp": 2, "tp": 2}),
        Layout({"cp": 2, "ep": 4}),  # ep borrows from dp_shard x cp
        Layout({"cp": 2, "etp": 2}),
        Layout({"cp": 2, "tp": 2, "ep": 4}),
        Layout({"cp": 2, "tp": 2, "etp": 2}, changes={"recompute": "selective"}),
        Layout({"pp": 2, "tp": 2, "ep": 2}, DEEP),
        Layout({"pp": 2, "tp": 2, "etp": 2}, DEEP),
        Layout({"pp": 2, "dp_shard": 2, "ep": 2}, DEEP),
    ]
    check(4, layouts)


@pytest.mark.slow
def test_eight_ranks_of_many_axes_find_what_one_process_finds():
    layouts = [
        Layout({"pp": 2, "dp_shard": 2, "tp": 2, "ep": 2}, DEEP),
        Layout({"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 2}),
        Layout({"dp_shard": 4, "tp": 2, "etp": 2}),
        Layout({"pp": 2, "cp": 2, "tp": 2, "ep": 2}, DEEP),
        Layout({"dp_replicate": 2, "cp": 2, "tp": 2, "ep": 2, "etp": 2}),
    ]
    check(8, layouts)


def _in_bf16(rank: int, world: int, axes: dict) -> tuple[float, set[torch.dtype], dict]:
    """Loss; dtypes that are added up over all ranks of a group; gradients."""
    layout = Layout(axes, changes={"precision": "bf16"})
    model, mesh, config, _ = parity.built(layout, world)
    mine = parity.mine(layout, mesh)
    counted = steps.count(mine, False, mesh).tokens
    with Communication() as seen:
        sums = steps.accumulate(model, mine, counted, mesh, config.router)
    added = {dtype for name, dtype in seen.dtypes if "allreduce" in name}
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if "moe" not in n}
    return sums.loss.item(), added, gradients


@pytest.mark.parametrize("axes", [{"tp": 2, "ep": 2}, {"tp": 2, "etp": 2}])
def test_bf16_adds_weights_gradients_up_in_fp32_and_finds_nearly_the_same(axes):
    """Nearly: rounding sends some tokens to other experts."""
    true = prove.reference(Layout().case().alone())
    for loss, added, gradients in run_ranks(2, _in_bf16, axes):
        assert added == {torch.float32}
        assert loss == pytest.approx(true.numbers["loss"], rel=2e-3)
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert prove.relative(gradient, true.gradients[name]) < 0.1, name
