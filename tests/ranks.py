"""Several gloo ranks inside a test: forked from a clean server, met through a file, ended in time.

The server has imported torch and ossature and run nothing, so it has no threads that a fork would
cut off in the middle of something; pytest's own process has many.  Functions and arguments travel
by pickle: a function is one of a test module's top level.
"""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch.distributed.fsdp", "ossature.train.loop", "tests.small_runs"])


def run_ranks(world: int, function: Callable[..., Any], *args: Any, seconds: float = 90) -> list:
    """`function(rank, world, *args)` on `world` ranks; their results, rank 0 first.

    A rank that raises fails the test with its traceback, and so does the deadline.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank,
            (world, function, args, folder, seconds),
            nprocs=world,
            join=False,
            start_method="forkserver",
        )
        deadline, done = time.monotonic() + seconds, False
        try:
            while not done and time.monotonic() < deadline:
                done = context.join(timeout=1)
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        assert not errors, "\n".join(errors)
        stacks = [path.read_text() for path in sorted(Path(folder).glob("stack*"))]
        assert done, "\n".join([f"{world} ranks took more than {seconds} s", *stacks])
        return [pickle.loads((Path(folder) / f"result{n}").read_bytes()) for n in range(world)]


def _rank(
    rank: int, world: int, function: Callable, args: tuple, folder: str, seconds: float
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    stack = (Path(folder) / f"stack{rank}").open("w")
    faulthandler.dump_traceback_later(seconds - 5, file=stack)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        result = function(rank, world, *args)
        (Path(folder) / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
    os._exit(0)  # no teardown of gloo's threads: it aborts now and then
