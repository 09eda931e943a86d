"""Ranks of a run: from torchrun's environment, or one process on its own.

One process is a world of size 1 and goes the same way as a thousand: the rest of the code is
written for a mesh.  SLURM and environment files set the same variables, so they need no case here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist


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
def launched(timeout: timedelta = timedelta(minutes=30)) -> Iterator[Ranks]:
    """Join the process group of this launch and leave it at the end.

    CPU tensors are reduced by gloo and CUDA tensors by NCCL, in the same groups: counts live on
    the CPU and cost no synchronisation.

    Raises:
        ValueError: the environment does not describe a launch.
    """
    rank, local_rank, world = environment()
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
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: no name lookups
    alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # needs no port
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=alone if world == 1 else None,
        rank=rank if world == 1 else -1,
        world_size=world if world == 1 else -1,
        timeout=timeout,
    )
    try:
        yield Ranks(rank, local_rank, world, device)
    finally:
        dist.destroy_process_group()


def environment() -> tuple[int, int, int]:
    """Rank, local rank and world size as torchrun sets them; a lone process is (0, 0, 1)."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if not given:
        return 0, 0, 1
    for name in names:
        if not os.environ.get(name, "").isdigit():
            raise ValueError(
                f"{name} ({os.environ.get(name, 'not set')}) must be a whole number, since "
                f"{given[0]} is set: launch with torchrun, or unset it"
            )
    return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
