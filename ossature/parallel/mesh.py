"""Ranks -> axes.  world = pp x dp_replicate x dp_shard x cp x tp, the last one innermost.

`ep` and `etp` borrow ranks of dp_shard x cp x tp and are no axes of this mesh: experts will live on
a second view of the same ranks.  Axes that are not built yet are refused here, by name.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ossature.config import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA_AXES = ("dp_replicate", "dp_shard")
"""Axes whose ranks read different rows."""
NOT_BUILT = ("pp", "cp", "tp", "ep", "etp")


def sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Ranks along every axis.

    Raises:
        ValueError: the axes do not multiply to `world`, or one is not built yet.
    """
    for axis in NOT_BUILT:
        if getattr(config, axis) > 1:
            raise ValueError(
                f"parallel.{axis} ({getattr(config, axis)}) must be 1: this axis is not built yet"
            )
    given = {axis: getattr(config, axis) for axis in AXES}
    others = math.prod(size for axis, size in given.items() if axis != "dp_shard")
    product = " x ".join(f"{axis} ({size})" for axis, size in given.items() if axis != "dp_shard")
    if config.dp_shard == 0:
        if world % others:
            raise ValueError(f"parallel: {product} must divide the number of ranks ({world})")
        given["dp_shard"] = world // others
    if others * given["dp_shard"] != world:
        raise ValueError(
            f"parallel: {product} x dp_shard ({given['dp_shard']}) must be the number of ranks "
            f"({world})"
        )
    return given


def build(axis_sizes: dict[str, int], device_type: str) -> DeviceMesh:
    """The mesh of all ranks; every axis is there, also those of size 1."""
    shape = tuple(axis_sizes[axis] for axis in AXES)
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks a weight is sharded and, with copies of the model, replicated over."""
    return mesh[DATA_AXES] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among those that read different rows, and their number."""
    rank, world = 0, 1
    for axis in DATA_AXES:
        rank = rank * mesh[axis].size() + mesh.get_local_rank(axis)
        world *= mesh[axis].size()
    return rank, world


def sum_over_data(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Add up, in place, over the ranks that read different rows."""
    for axis in DATA_AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(tensor, group=mesh.get_group(axis))
    return tensor
