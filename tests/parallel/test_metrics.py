"""Whole runs of `ossature train`: the same metrics and weights as one process, on any layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ossature.checkpoint.store import list_weights, newest, read_weight
from ossature.config import ParallelConfig, RouterConfig, TrainConfig
from ossature.convert.config import hugging_face_config
from ossature.data.loader import Loader
from ossature.data.packing import Row
from ossature.train.loop import train
from tests.ranks import run_ranks
from tests.small_runs import TINY, change, records, small_run

PP = {"pp": 2}
LAYOUTS = {
    2: [
        {**PP, "pp_schedule": "GPipe"},
        {**PP, "pp_schedule": "1F1B"},
        {**PP, "pp_schedule": "Interleaved1F1B"},
        {**PP, "pp_schedule": "ZBVZeroBubble"},
        {**PP, "pp_schedule": "DualPipeV"},
        {"tp": 2},
        {"etp": 2, "loss_parallel": False},
    ],
    4: [
        {"cp": 4},
        {"ep": 4},
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
        {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
        {"dp_shard": 2, "tp": 2, "ep": 4},
        {"dp_replicate": 2, "tp": 2, "etp": 2},
        {**PP, "tp": 2, "ep": 2},
    ],
}


def run_of(folder: Path, axes: dict, **changes) -> TrainConfig:
    """5 steps on packed mock documents, every router loss and the balancing bias on."""
    config = small_run(
        folder,
        steps=5,
        global_batch_tokens=256,
        micro_batch_tokens=64,
        router=RouterConfig(aux_loss=0.1, bias_update_rate=0.01, bias_anneal_steps=2),
        eval__every_steps=5,
        eval__tokens=192,
        parallel=ParallelConfig(**axes),
    )
    return change(config, **changes)


def agree(run: Path, alone: Path) -> None:
    """Metrics of every step, and the weights at the end."""
    found, true = records(run), records(alone)
    assert [record["step"] for record in found] == [record["step"] for record in true]
    for mine, theirs in zip(found, true, strict=True):
        for key in ("loss", "grad_norm", "router_loss", "validation_loss"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (mine["step"], key)
        assert mine["counted_tokens"] == theirs["counted_tokens"]
        for load, its in zip(mine["router"]["load"], theirs["router"]["load"], strict=True):
            assert load == pytest.approx(its, abs=0.02)
    mine, theirs = newest(run), newest(alone)
    assert list_weights(mine) == list_weights(theirs)
    for name in list_weights(theirs):
        true = read_weight(theirs, name)
        off = torch.linalg.vector_norm(read_weight(mine, name) - true)
        assert off < 2e-3 * torch.linalg.vector_norm(true), name


def _train(rank: int, world: int, configs: list[TrainConfig]) -> None:
    for config in configs:
        train(config)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, _train, [run_of(run, {})])
    return run


def _train_on_ragged_masks(rank: int, world: int, configs: list[TrainConfig]) -> None:
    """As data for fine-tuning have them: of each row another share of the tokens is counted."""
    whole = Loader.row

    def row(self: Loader, number: int) -> Row:
        found = whole(self, number)
        share = (0.1, 0.9, 0.4, 0.7)[number % 4]
        kept = np.random.default_rng([7, number]).random(len(found.tokens)) < share
        return found._replace(loss_mask=found.loss_mask & kept)

    Loader.row = row  # type: ignore[method-assign]
    _train(rank, world, configs)


@pytest.fixture(scope="module")
def alone_on_ragged_masks(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone_on_ragged_masks") / "run"
    run_ranks(1, _train_on_ragged_masks, [run_of(run, {}, model="deep")])
    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_five_steps_have_the_metrics_of_one_process(tmp_path, alone_on_ragged_masks, ranks):
    """-s prints what docs/parallelism.md says of each layout."""
    alone = records(alone_on_ragged_masks)
    runs = [run_of(tmp_path / str(n), axes, model="deep") for n, axes in enumerate(LAYOUTS[ranks])]
    run_ranks(ranks, _train_on_ragged_masks, runs, seconds=400)
    for config, axes in zip(runs, LAYOUTS[ranks], strict=True):
        off = {
            key: max(
                abs(mine[key] / theirs[key] - 1)
                for mine, theirs in zip(records(config.run), alone, strict=True)
            )
            for key in ("loss", "grad_norm")
        }
        print(f"{axes}: loss {off['loss']:.1e}, grad_norm {off['grad_norm']:.1e}")
        agree(config.run, alone_on_ragged_masks)
    counted = [record["counted_tokens"] for record in alone]
    assert len(set(counted)) > 1 and max(counted) < 5 * 256 * 0.8


@pytest.mark.slow
def test_a_run_goes_on_at_another_layout_with_the_metrics_of_one_process(tmp_path):
    """4 ranks that share all weights, 4 that divide layers and experts, then two, then one."""
    constant = {"optim__schedule": "constant", "router__bias_anneal_steps": 0}
    run_ranks(1, _train, [run_of(tmp_path / "alone", {}, **constant)])
    chain = [(4, 1, {}), (4, 3, {"tp": 2, "ep": 2}), (2, 4, {"etp": 2}), (1, 5, {})]
    for ranks, steps, axes in chain:
        run_ranks(ranks, _train, [run_of(tmp_path / "run", axes, steps=steps, **constant)])
    agree(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_torchrun_has_the_metrics_of_one_process(tmp_path, alone):
    """As a user launches it, with a file and flags."""
    shape = json.dumps(hugging_face_config(TINY, dtype="float32"))
    (tmp_path / "config.json").write_text(shape)
    # In the file and no flag: torchrun takes an option --run for its own --run-path.
    (tmp_path / "run.toml").write_text(f'run = "{tmp_path / "run"}"\nmodel = "{tmp_path}"\n')
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 4 -m "
        f"ossature train {tmp_path / 'run.toml'} --data.mock true --data.seq-len 32 --steps 5 "
        "--precision fp32 --global-batch-tokens 256 --micro-batch-tokens 64 --optim.lr 1e-2 "
        "--optim.warmup-steps 2 --router.aux-loss 0.1 --router.bias-update-rate 0.01 "
        "--router.bias-anneal-steps 2 --eval.every-steps 5 --eval.tokens 192 "
        "--parallel.tp 2 --parallel.ep 4"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command.split(), env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    agree(tmp_path / "run", alone)
