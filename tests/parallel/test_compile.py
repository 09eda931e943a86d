"""torch.compile of every block under every axis, with and without recomputation."""

from pathlib import Path

import pytest
from torch import nn

from ossature.config import ParallelConfig
from ossature.parallel import plan
from ossature.parallel.recompute import compile_block, recompute
from tests.parallel import parity
from tests.parallel.parity import DEEP, Layout
from tests.parallel.test_tensor import check
from tests.small_runs import small_run

ON = {"compile": True}
FULL = {"compile": True, "recompute": "full"}
SELECTIVE = {"compile": True, "recompute": "selective"}
SECONDS = 600
"""Compilation takes minutes where nothing has been compiled before."""


@pytest.mark.slow
def test_compiled_blocks_of_two_ranks_find_what_one_process_finds():
    check(2, [
        Layout({}, changes=ON),
        Layout({"dp_replicate": 2, "dp_shard": 1}, changes=FULL),
        Layout({}, changes=SELECTIVE),
        Layout({"tp": 2, "ep": 2}, changes=FULL),
        Layout({"ep": 2}, changes=ON),
    ], SECONDS)  # fmt: skip


@pytest.mark.slow
def test_compiled_blocks_of_split_sequences_and_experts_find_what_one_process_finds():
    check(2, [
        Layout({"cp": 2}, changes=ON),
        Layout({"cp": 2, "ep": 2}, changes=FULL),
        Layout({"etp": 2}, changes=FULL),
        Layout({"tp": 2, "etp": 2}, changes=ON),
    ], SECONDS)  # fmt: skip


@pytest.mark.slow
def test_compiled_blocks_of_stages_find_what_one_process_finds():
    check(2, [
        Layout({"pp": 2}, DEEP, ON),
        Layout({"pp": 2}, DEEP, SELECTIVE),
        Layout({"pp": 2, "pp_schedule": "Interleaved1F1B"}, DEEP, FULL),
        Layout({"pp": 2, "pp_schedule": "ZBVZeroBubble"}, DEEP, FULL),
    ], SECONDS)  # fmt: skip


def plant(_fault: str, patch: pytest.MonkeyPatch) -> None:
    def outside(block: nn.Module, mode: str, dropout: bool) -> None:
        recompute(block, mode, dropout)
        compile_block(block)

    patch.setattr(plan, "recompute", outside)
    patch.setattr(plan, "compile_block", lambda block: None)


@pytest.mark.slow
def test_blocks_that_are_not_compiled_though_asked_for_are_seen():
    """Recomputation outside in, as it was: dynamo gives the block up and says nothing."""

    (errors,) = parity.worst(2, [Layout({"tp": 2}, changes=FULL, fault="outside")], plant)
    assert not errors["nothing was compiled"] < 1e-3


@pytest.mark.parametrize("axis", ["tp", "ep", "etp", "cp"])
def test_selective_recomputation_of_compiled_blocks_that_end_their_graphs_is_refused(axis):
    axes = ParallelConfig(**{axis: 2})
    line = rf"recompute \(selective\) must be none or full with compile and parallel.{axis} \(2\)"
    with pytest.raises(ValueError, match=f"^{line}"):
        small_run(Path("unused"), parallel=axes, **SELECTIVE)
