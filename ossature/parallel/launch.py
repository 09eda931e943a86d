"""The process group of a run: joined at its start, watched, and left at its end.

One process is a world of size 1 and goes the same way as a thousand: the rest of the code is
written for a mesh.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from ossature.parallel.environment import Place, environment
from ossature.parallel.watch import Watch, is_communication, meet

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Of one collective while all ranks are alive: one of them may write or compile meanwhile."""


class Ranks(NamedTuple):
    rank: int
    """Of this process among all, from 0."""
    local_rank: int
    """Of this process among those of its machine, from 0."""
    world: int
    """Processes in all."""
    device: torch.device

    @property
    def first(self) -> bool:
        """The rank that speaks: it alone prints and writes what is written once."""
        return self.rank == 0


@contextmanager
def launched(
    timeout_seconds: int = 300, stopping: Callable[[], bool] = lambda: False
) -> Iterator[Ranks]:
    """Join the process group of this launch and leave it at the end.

    CPU tensors are reduced by gloo and CUDA tensors by NCCL, in the same groups: counts live on
    the CPU and cost no synchronisation.

    Args:
        timeout_seconds: a rank that is gone, or does not come, for so long ends all of them
            (`ossature.parallel.watch`).
        stopping: whether this process was told to end.

    Raises:
        ValueError: the environment does not describe a launch.
        OSError: the ranks did not meet, or one was lost.
    """
    place = environment()
    rank, local_rank, world = place[:3]
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK ({local_rank}) must be less than the number of GPUs "
            f"({torch.cuda.device_count()})"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():  # a test, or a caller with a launcher of its own
        yield Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)
        return
    if place.one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: no name lookups
    ranks = Ranks(rank, local_rank, world, device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if world == 1:
        alone = HashStore()  # needs no port
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        try:
            yield ranks
        finally:
            dist.destroy_process_group()
        return
    with _watched(place, timeout_seconds, stopping) as store:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
        yield ranks
        # Rank 0 may hold the store: nobody goes while another may still ask there.
        dist.all_reduce(torch.zeros(1))


@contextmanager
def _watched(place: Place, timeout_seconds: int, stopping: Callable[[], bool]) -> Iterator[Store]:
    """The store where the ranks met, while each watches another; the group is destroyed after."""
    store = meet(place, timeout_seconds, stopping)
    watch = Watch(place, timeout_seconds)
    watch.start()
    lost = False
    try:
        watch.wait_for_all(stopping)
        yield store
    except BaseException as error:
        lost = is_communication(error)
        watch.explain(error, stopping)
        raise
    finally:
        watch.leave()
        if dist.is_initialized() and not lost:  # a group with a dead rank cannot be taken down
            dist.destroy_process_group()


@contextmanager
def first_prints(ranks: Ranks) -> Iterator[None]:
    """What the other ranks print goes nowhere: all of them do the same."""
    if ranks.first:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield
