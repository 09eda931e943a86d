"""Kill -9 one rank of four at random moments, go on each time, and compare with runs never killed.

    python benchmarks/kill_rank.py [--kills 10]

Half of the kills fall on a job of `ossature launch --max-restarts`, whose agent starts all ranks
again (pp 2 x dp_shard 2, ep 2); half on four processes as `srun` starts them, which have to end by
themselves and are started anew from here (dp_shard 2 x tp 2, ep 4).  One kill in five falls into
the start.  Exit status 1 if survivors do not end within `timeout_seconds` and name the dead rank,
or if weights, optimizer or metrics differ in a bit at the end.
"""

from __future__ import annotations

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

import psutil
from kill_resume import differences, last_step

from ossature.checkpoint import store
from ossature.config import parse

RANKS = 4
LAYOUTS = {
    "elastic": ["--parallel.pp", "2", "--parallel.dp_shard", "2", "--parallel.ep", "2"],
    "srun": ["--parallel.dp_shard", "2", "--parallel.tp", "2", "--parallel.ep", "4"],
}


@dataclass(frozen=True, kw_only=True)
class Options:
    kills: int = 10
    steps: int = 40
    seed: int = 0
    """Of the moments and ranks."""
    timeout_seconds: int = 100


def main() -> int:
    options = parse(Options, sys.argv[1:])
    draw, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kill_rank_"))
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore
    good = True
    try:
        for way, kills in (("elastic", options.kills // 2), ("srun", -(-options.kills // 2))):
            whole, killed = folder / f"{way}_whole", folder / f"{way}_killed"
            began = time.monotonic()
            statuses = [process.wait() for process in srun(whole, way, options)]
            assert not any(statuses), errors(whole)
            seconds = time.monotonic() - began
            print(f"{way}, never killed: {options.steps} steps in {seconds:.0f} s")
            moments = Moments(draw, seconds, options, kills)
            half = elastic if way == "elastic" else by_themselves
            if not half(killed, kills, moments, options):
                good = False
                continue
            different = differences(whole, killed)
            print(*(f"  differs: {line}" for line in different), sep="\n", end="")
            print(f"{way}: {kills} kills, {moments.saving} of them while saving; ", end="")
            print("NOT EQUAL" if different else "bitwise equal: weights, optimizer, metrics")
            good &= not different
    finally:
        shutil.rmtree(folder)
    return 0 if good else 1


@dataclass
class Moments:
    """When to kill, told by steps: a busy machine is several times slower a minute later."""

    draw: random.Random
    seconds: float
    """A run takes."""
    options: Options
    kills: int
    saving: int = 0

    def wait(self, run: Path, processes: list[subprocess.Popen]) -> str:
        """Until the moment; what was going on then."""
        steps, before = self.options.steps, last_step(run)
        pause = self.draw.uniform(0, self.seconds / steps)
        goal = before + self.draw.randint(1, max(1, steps // self.kills - 2))
        if self.draw.random() < 0.2:
            goal, pause = 0, self.draw.uniform(0, 5)  # imports, meeting, building
        while last_step(run) < goal:
            ended = [process.returncode for process in processes if process.poll() is not None]
            assert not ended, f"before the kill processes ended with {ended}: {errors(run)}"
            time.sleep(0.005)
        time.sleep(pause)
        partial = list((run / "checkpoints").glob("*.partial"))
        self.saving += bool(partial)
        place = f"at step {last_step(run)}" if last_step(run) > before else "at the start"
        return place + (f", {partial[0].name} half written" if partial else "")


def elastic(run: Path, kills: int, moments: Moments, options: Options) -> bool:
    """One job whose agent starts the ranks again after each kill; whether it named them."""
    words = ["launch", "--gpus-per-node", str(RANKS), "--max-restarts", str(kills), "--"]
    log = run.with_suffix(".log")
    with log.open("w") as file:
        agent = start([*words, *train(run, "elastic", options)], os.environ, file)
    dead: list[int] = []
    known = 0
    for n in range(kills):
        ranks = wait_for_ranks(agent, gone=dead)
        when = moments.wait(run, [agent])
        victim = moments.draw.randrange(RANKS)
        began, known = time.monotonic(), len(log.read_text())
        dead = list(ranks.values())
        os.kill(ranks[victim], signal.SIGKILL)
        while any(psutil.pid_exists(pid) for pid in dead):
            time.sleep(0.01)
        took = time.monotonic() - began
        while "failed (exitcode" not in log.read_text()[known:] and time.monotonic() - began < 60:
            time.sleep(0.01)  # the agent says so after it has ended the others
        named = f"exitcode: -9) local_rank: {victim} " in log.read_text()[known:]
        found = store.newest(run)
        print(f"  kill {n + 1}: rank {victim} {when}; whole: {found and found.name}; the others "
              f"ended {took:.1f} s later, {'named' if named else 'NOT NAMED'}")  # fmt: skip
        if not named or took > options.timeout_seconds:
            print(log.read_text()[known:])
            agent.terminate()
            agent.wait()
            return False
    if agent.wait():
        print(f"  the agent ended with {agent.returncode}", log.read_text()[known:], sep="\n")
    return agent.returncode == 0


def wait_for_ranks(agent: subprocess.Popen, gone: list[int]) -> dict[int, int]:
    """Rank -> process, of the agent's newest start."""
    while agent.poll() is None:
        found = {}
        for child in psutil.Process(agent.pid).children():
            try:
                variables = child.environ()
            except psutil.Error:
                continue
            if child.pid not in gone and "RANK" in variables:
                found[int(variables["RANK"])] = child.pid
        if len(found) == RANKS:
            return found
        time.sleep(0.05)
    raise AssertionError(f"the agent ended with {agent.returncode} before the kill")


def by_themselves(run: Path, kills: int, moments: Moments, options: Options) -> bool:
    """Four processes for every kill, and at last four that nobody kills."""
    good = True
    for n in range(kills):
        ranks = srun(run, "srun", options)
        when = moments.wait(run, ranks)
        victim = moments.draw.randrange(RANKS)
        began = time.monotonic()
        ranks[victim].kill()
        statuses = [process.wait() for process in ranks]
        took = time.monotonic() - began
        said = errors(run)
        del said[f"{run.name}_rank{victim}"]
        named = [any(f"rank {victim} " in line for line in each) for each in said.values()]
        right = all(named) and sorted(statuses) == [-signal.SIGKILL, 1, 1, 1]
        right &= took < options.timeout_seconds
        good &= right
        found = store.newest(run)
        print(f"  kill {n + 1}: rank {victim} {when}; whole: {found and found.name}; the others "
              f"ended {took:.1f} s later with {statuses}, "
              f"{'all name it' if right else 'WRONG'}")  # fmt: skip
        if not right:
            print(said)
    statuses = [process.wait() for process in srun(run, "srun", options)]
    if any(statuses):
        print(f"  nobody killed: {statuses}: {errors(run)}")
    return good and not any(statuses)


def errors(run: Path) -> dict[str, list[str]]:
    """What each process of a run has printed as its errors, by the name of its log."""
    logs = {
        path.stem: path.read_text().splitlines() for path in run.parent.glob(f"{run.name}*.log")
    }
    return {
        name: [line for line in log if line.startswith("error: ")]
        for name, log in sorted(logs.items())
    }


def srun(run: Path, way: str, options: Options) -> list[subprocess.Popen]:
    """The ranks of a run as `srun` starts them: no agent, SLURM's variables."""
    job = str(random.randrange(10**6, 10**7))  # another port every time
    started = []
    for rank in range(RANKS):
        variables = {
            **os.environ, "SLURM_JOB_ID": job, "SLURM_NTASKS": str(RANKS),
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODELIST": "localhost",
        }  # fmt: skip
        with run.with_name(f"{run.name}_rank{rank}.log").open("w") as file:
            started.append(start(train(run, way, options), variables, file))
    return started


def start(words: list[str], variables, file) -> subprocess.Popen:
    command = [sys.executable, "-m", "ossature", *words]
    return subprocess.Popen(command, stdout=file, stderr=file, env=dict(variables))


def train(run: Path, way: str, options: Options) -> list[str]:
    return [
        "train", f"--run={run}", "--steps", str(options.steps), *LAYOUTS[way],
        "--timeout_seconds", str(options.timeout_seconds), "--checkpoint.every_steps", "2",
        "--data.mock", "true", "--data.seq_len", "64", "--micro_batch_tokens", "64",
        "--global_batch_tokens", "256", "--optim.warmup_steps", "5", "--log.tensorboard", "false",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
