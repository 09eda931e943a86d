"""Weights and optimizer state written by one layout and read by another, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ossature.checkpoint.store import load_weights, read_weight, save_weights
from ossature.model.init import initial_weight
from ossature.parallel import weights
from ossature.train import optim, prove
from ossature.train import step as steps
from ossature.train.prove import whole
from tests.parallel import parity
from tests.parallel.parity import TINY, Layout
from tests.ranks import run_ranks

ODD = replace(TINY, vocab_size=97, num_local_experts=12)
"""Rows of the vocabulary and experts that do not divide evenly over what they are sharded on."""

LAYOUTS = [
    {},
    {"tp": 2},
    {"dp_replicate": 2, "ep": 2},
    {"tp": 2, "ep": 2},
    {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
    {"ep": 4},
    {"etp": 4},
    {"dp_replicate": 2, "tp": 2, "etp": 2},
]


def parts(axes: dict, world: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of this rank, after one step."""
    layout = Layout(axes, ODD)
    model, mesh, config, _ = parity.built(layout, world)
    named = dict(model.named_parameters())
    optimizer = optim.build(named.items(), config.optim)
    steps.accumulate(model, parity.mine(layout, mesh), 100, mesh, config.router)
    optimizer.step()
    return {**named, **optim.state(optimizer)}


def _round_the_layouts(rank: int, world: int, folder: Path, layouts: list[dict]) -> list[str]:
    """Each layout writes, and the next one reads; names of what is not bit-equal."""
    states = [parts(axes, world) for axes in layouts]
    wrong = []
    for number, mine in enumerate(states):
        other = number - 1
        save_weights(folder / str(number), mine)
        true = {name: whole(tensor.detach()).clone() for name, tensor in mine.items()}
        for tensor in states[other].values():
            weights.local(tensor.detach()).fill_(torch.nan)
        load_weights(folder / str(number), states[other])
        for name, tensor in states[other].items():
            if not torch.equal(whole(tensor.detach()), true[name]):
                wrong.append(f"{layouts[number]} -> {layouts[other]}: {name}")
        if rank == 0 and number == 0:
            for name, tensor in true.items():
                if not torch.equal(read_weight(folder / str(number), name), tensor):
                    wrong.append(f"{layouts[number]} -> one process: {name}")
    return wrong


def test_a_checkpoint_is_read_bit_for_bit_by_another_layout(tmp_path):
    """Four ranks that share all weights -> tp x ep, and tp x ep -> one process."""
    chain = [{"tp": 2, "ep": 2}, {}]
    assert run_ranks(4, _round_the_layouts, tmp_path, chain) == [[]] * 4


@pytest.mark.slow
def test_all_layouts_read_each_others_checkpoints_bit_for_bit(tmp_path):
    assert run_ranks(4, _round_the_layouts, tmp_path, LAYOUTS) == [[]] * 4


def _filled(rank: int, world: int, layouts: list[dict]) -> list[str]:
    wrong = []
    for axes in layouts:
        model, *_ = parity.built(Layout(axes, ODD), world)
        for name, parameter in model.named_parameters():
            if not torch.equal(whole(parameter.detach()), prove.drawn(ODD)[name]):
                wrong.append(f"{axes}: {name}")
        weights.initialise(model, seed=3)
        for name, parameter in model.named_parameters():
            true = initial_weight(ODD, name, tuple(parameter.shape), 3)
            if not torch.equal(whole(parameter.detach()), true):
                wrong.append(f"{axes}, initialised: {name}")
    return wrong


def test_every_layout_is_filled_with_the_same_weights():
    assert run_ranks(4, _filled, LAYOUTS) == [[]] * 4
