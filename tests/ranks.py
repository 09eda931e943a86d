"""Several gloo ranks inside a test: forked, met through a file, ended by a deadline."""

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
import torch.distributed.fsdp  # imported before the fork: once, not by every rank
import torch.multiprocessing as mp


def run_ranks(world: int, function: Callable[..., Any], *args: Any, seconds: float = 90) -> list:
    """`function(rank, world, *args)` on `world` ranks; their results, rank 0 first.

    A rank that raises fails the test with its traceback, and so does the deadline.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _rank, (world, function, args, folder), nprocs=world, join=False, start_method="fork"
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
        assert done, f"{world} ranks took more than {seconds} s"
        return [pickle.loads((Path(folder) / f"result{n}").read_bytes()) for n in range(world)]


def _rank(rank: int, world: int, function: Callable, args: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
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
