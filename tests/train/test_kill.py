"""Kill -9 at any moment: the last whole checkpoint is there, and going on from it is exact."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ossature.checkpoint import steps as checkpoint_steps
from ossature.checkpoint import store
from ossature.config import TrainConfig
from ossature.train.loop import train
from ossature.train.signals import StopRequest
from tests.ranks import CLEAN, run_ranks
from tests.small_runs import records, small_run
from tests.train.test_loop import assert_same_run, worst_difference

RUN = {"optim__eps": 0.1, "steps": 8, "checkpoint__every_steps": 1, "checkpoint__keep": 2}


def ended(target: Callable[..., None], *args: Any, after: float = 60.0, kill: bool = False) -> int:
    """Run a function in a process of its own; its exit code, negative for the signal that ended it.

    Args:
        after: seconds it may take.
        kill: kill -9 it then; otherwise the test fails.
    """
    process = CLEAN.Process(target=target, args=args)
    process.start()
    process.join(after)
    late = process.exitcode is None
    if late:
        process.kill()
        process.join()
    assert kill or not late, f"the process took more than {after} s"
    assert process.exitcode is not None
    return process.exitcode


def run(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    train(config)
    os._exit(0)


def run_until_call(config: TrainConfig, module: str, name: str, number: int) -> None:
    """Train, and kill this very process as it enters the `number`th call of a function."""
    place, calls = importlib.import_module(module), []
    plain = getattr(place, name)

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)

    setattr(place, name, counting)
    run(config)


# One checkpoint calls save_weights twice (optimizer, then weights), _write_synced for config.json
# and state.json, _sync_folder three times (the last after the rename), and, from the third
# checkpoint on, rmtree for the oldest.
STEPS = "ossature.checkpoint.steps"
MOMENTS = {
    "before the optimizer of step 3": (STEPS, "save_weights", 5, [1, 2]),
    "between optimizer and weights of step 3": (STEPS, "save_weights", 6, [1, 2]),
    "before state.json of step 3": (STEPS, "_write_synced", 6, [1, 2]),
    "before the rename of step 3": (STEPS, "_sync_folder", 8, [1, 2]),
    "after the rename of step 3": (STEPS, "_sync_folder", 9, [1, 2, 3]),
    "while step 2 is removed": ("shutil", "rmtree", 6, [3, 4]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that was never killed."""
    folder = tmp_path_factory.mktemp("whole")
    train(small_run(folder, **RUN))
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_during_a_save_leaves_the_last_whole_step(tmp_path, whole, moment):
    module, name, number, left = MOMENTS[moment]
    config = small_run(tmp_path / "b", **RUN)
    assert ended(run_until_call, config, module, name, number) == -signal.SIGKILL
    found = store.checkpoints(tmp_path / "b")
    assert [store.step_of(folder) for folder in found] == left
    for folder in found:
        shapes = store.list_weights(folder).items()
        store.load_weights(folder, {name: torch.empty(shape) for name, (shape, _) in shapes})
    train(config)
    assert_same_run(whole, tmp_path / "b")
    assert not list((tmp_path / "b" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_at_random_moments_leave_no_trace(tmp_path, asynchronous):
    config = small_run(tmp_path / "b", checkpoint__asynchronous=asynchronous, **RUN)
    began = time.monotonic()
    assert ended(run, small_run(tmp_path / "a", **RUN)) == 0
    whole = time.monotonic() - began
    draw = random.Random(int(asynchronous))
    codes = [ended(run, config, after=draw.uniform(0.2, 0.7) * whole, kill=True) for _ in range(3)]
    assert -signal.SIGKILL in codes
    assert ended(run, config) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def _die_together(rank: int, world: int, config) -> None:
    """Both ranks are killed while the third checkpoint is written, after half of it."""
    plain, calls = checkpoint_steps.save_weights, []

    def counting(*args):
        plain(*args)
        calls.append(0)
        if len(calls) == 5:
            dist.barrier()
            (config.run / f"reached{rank}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_steps.save_weights = counting
    train(config)


def _train(rank: int, world: int, config) -> None:
    train(config)


def test_two_ranks_killed_during_a_save_go_on_from_the_last_whole_step(tmp_path, whole):
    config = small_run(tmp_path / "b", **RUN)
    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(2, _die_together, config)
    assert (config.run / "reached0").exists() and (config.run / "reached1").exists()
    last = store.newest(config.run)
    assert last and store.step_of(last) == 2
    run_ranks(2, _train, config)
    assert worst_difference(whole, config.run) < 1e-4
    assert [r["step"] for r in records(config.run)] == list(range(1, 9))


def command(run: Path, *more: str) -> list[str]:
    """A run of the debug size through the command line."""
    return [
        sys.executable, "-m", "ossature", "train", f"--run={run}", "--data.mock", "true",
        "--data.seq_len", "32", "--micro_batch_tokens", "32", "--global_batch_tokens", "64",
        "--optim.warmup_steps", "2", "--log.tensorboard", "false", *more,
    ]  # fmt: skip


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(records(run)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_command_with_0_and_says_how_to_go_on(tmp_path, number):
    process = subprocess.Popen(
        command(tmp_path, "--steps", "10000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_step(tmp_path, 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = store.newest(tmp_path)
    assert last and store.step_of(last) == len(records(tmp_path))
    words = command(tmp_path, "--steps", "10000")
    assert out.splitlines()[-1] == f"to go on: ossature {' '.join(words[3:])}"
    assert err == ""


def test_a_second_signal_ends_it_at_once(tmp_path):
    """Under a debugger or a hanging file system nobody wants to wait for a step."""
    assert ended(signal_twice) == -signal.SIGTERM


def signal_twice() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        if stop.asked:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)


@pytest.mark.slow
def test_torchrun_passes_the_signal_on_and_all_ranks_save(tmp_path):
    # torchrun takes `--run` for an option of its own: the folder is given in a run file.
    (tmp_path / "run.toml").write_text(f'run = "{tmp_path}"\n')
    words = command(tmp_path, "--steps", "10000")[5:]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "ossature", "train", str(tmp_path / "run.toml"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    out, _err = process.communicate(timeout=60)
    last = store.newest(tmp_path)
    assert last and store.step_of(last) == len(records(tmp_path))
    assert out.count("to go on: torchrun --nproc-per-node 2 -m -- ossature train") == 1


@pytest.mark.slow
def test_two_ranks_say_a_mistake_once(tmp_path):
    (tmp_path / "run.toml").write_text(f'run = "{tmp_path}/r"\n[data]\npath = "nowhere"\n')
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "ossature", "train", str(tmp_path / "run.toml")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "nowhere" in lines[0]
    assert not (tmp_path / "r").exists()
