"""Kill -9 a training run at random moments, go on each time, and compare with one never killed.

    python benchmarks/kill_resume.py [--kills 10] [--ranks 1] [--asynchronous true]

A run of the debug size that saves every other step, so that a good part of the kills falls into
saving.  Prints where each kill fell; exit status 1 if the weights, the optimizer's state or the
metrics differ in a bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ossature.checkpoint import store
from ossature.config import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 10
    ranks: int = 1
    steps: int = 60
    seed: int = 0
    """Of the moments."""
    asynchronous: bool = False
    """Checkpoints are written in the background."""


def main() -> int:
    options = parse(Options, sys.argv[1:])
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    try:
        return compare(folder, options)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, options: Options) -> int:
    whole = folder / "whole"
    began = time.monotonic()
    assert start(whole, options).wait() == 0
    seconds = time.monotonic() - began
    print(f"never killed: {options.steps} steps in {seconds:.1f} s")

    killed, draw, kills, saving = folder / "killed", random.Random(options.seed), 0, 0
    while kills < options.kills:
        process = start(killed, options)
        # Some steps on, and then somewhere within a step or the saving after it: moments are told
        # by steps, since a busy machine is several times slower from one minute to the next.
        goal = last_step(killed) + draw.randint(1, max(1, options.steps // options.kills - 2))
        while last_step(killed) < goal and process.poll() is None:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, seconds / options.steps))
        partial = list((killed / "checkpoints").glob("*.partial"))
        if process.poll() is not None:
            print("  it was done before the kill: start again with more steps")
            return 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        saving += bool(partial)
        found = store.newest(killed)
        at = f", {partial[0].name} half written" if partial else ""
        print(f"  kill {kills}: at step {last_step(killed)}{at}; whole: {found and found.name}")
    assert start(killed, options).wait() == 0
    print(f"{kills} kills, {saving} of them while saving")

    different = differences(whole, killed)
    for line in different:
        print(f"  differs: {line}")
    print("bitwise equal: weights, optimizer, metrics" if not different else "NOT EQUAL")
    return 1 if different else 0


def start(run: Path, options: Options) -> subprocess.Popen:
    """The run, from its newest checkpoint if it has one."""
    run.mkdir(exist_ok=True)
    file = run.with_suffix(".toml")
    file.write_text(f'run = "{run}"\n')
    launch = ["-m", "ossature"]
    if options.ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                  str(options.ranks), "-m", "ossature"]  # fmt: skip
    words = [
        sys.executable, *launch, "train", str(file), "--steps", str(options.steps),
        "--data.mock", "true", "--data.seq_len", "64", "--micro_batch_tokens", "64",
        "--global_batch_tokens", "256", "--optim.warmup_steps", "5", "--log.tensorboard", "false",
        "--checkpoint.every_steps", "2", "--checkpoint.asynchronous", str(options.asynchronous),
    ]  # fmt: skip
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal bit for bit in the newest checkpoints and in the metrics."""
    newest, newest_other = store.newest(one), store.newest(other)
    assert newest and newest_other
    found = [] if newest.name == newest_other.name else [f"{newest.name}, {newest_other.name}"]
    for part in (Path(), Path("optimizer")):
        names = store.list_weights(newest / part)
        if names != store.list_weights(newest_other / part):
            found.append(f"names in {part}")
            continue
        for name in names:
            values = (store.read_weight(folder / part, name) for folder in (newest, newest_other))
            if not torch.equal(*values):
                found.append(name)
    for line, line_other in zip(metrics(one), metrics(other), strict=True):
        if line != line_other:
            found.append(f"metrics of step {line['step']}")
    return found


def metrics(run: Path) -> list[dict]:
    times = ("seconds", "tokens_per_second", "memory_bytes")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
