"""Ranks as child processes on this machine's CPU: met through a file, ended in time.

They are forked from a clean server that has run nothing: a process that has computed has threads,
which a fork would cut off in the middle of something.  Functions, arguments and results travel by
pickle, so a function is one of a module's top level.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

CLEAN = multiprocessing.get_context("forkserver")

COLLECTIVE_SECONDS = 60
"""How long a rank waits for the others."""


class RanksFailed(RuntimeError):
    """A rank raised, died, or did not end in time; the message says which, and what it said."""


def preload(*modules: str) -> None:
    """Have the server import these once, for all ranks; without effect once it runs."""
    CLEAN.set_forkserver_preload(["torch.distributed.fsdp", *modules])


def run_ranks(world: int, function: Callable[..., Any], *args: Any, seconds: int) -> list:
    """`function(rank, world, *args)` on `world` gloo ranks; their results, rank 0 first.

    Raises:
        RanksFailed: with the traceback of the rank that raised first; the others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = start_processes(
            _rank,
            (world, function, args, folder, seconds),
            nprocs=world,
            join=False,
            start_method="forkserver",
        )
        assert context is not None
        deadline, done, died = time.monotonic() + seconds, False, ""
        try:
            while not done and time.monotonic() < deadline:
                done = context.join(timeout=1)  # False as soon as the first child ends
        except ProcessExitedException as end:
            died = (
                f"rank {end.error_index} of {world} ended with {end.signal_name or end.exit_code}"
            )
        finally:
            for process in context.processes:
                if process is not None and process.is_alive():
                    process.kill()
        errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:  # the first; the others' follow from it
            raise RanksFailed(errors[0].read_text())
        if died:
            raise RanksFailed(died)
        if not done:
            stacks = [path.read_text() for path in sorted(folder.glob("stack*"))]
            raise RanksFailed("\n".join([f"{world} ranks took more than {seconds} s", *stacks]))
        return [pickle.loads((folder / f"result{n}").read_bytes()) for n in range(world)]


def _rank(
    rank: int, world: int, function: Callable, args: tuple, folder: Path, seconds: int
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    stack = (folder / f"stack{rank}").open("w")
    faulthandler.dump_traceback_later(max(1, seconds - 5), file=stack)
    status = 0
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=min(seconds, COLLECTIVE_SECONDS)),
        )
        result = function(rank, world, *args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank} of {world}: {traceback.format_exc()}")
        status = 1  # which ends the others
    os._exit(status)  # no teardown of gloo's threads: it aborts now and then
