"""Ranks -> axes.  world = pp x dp_replicate x dp_shard x cp x tp, the last one innermost.

The same ranks are seen three ways.  `build` makes the axes above.  `dense_view` joins dp_shard and
cp, the ranks a weight is sharded over.  `expert_view` deals the ranks of dp_shard x cp x tp out
once more, as efsdp x ep x etp: experts live there, and so ep and etp cost no ranks of their own.

Ranks that differ in pp, cp or tp alone read the same rows.  Of those, ranks of tp find the same
loss, and ranks of cp parts of it.
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ossature.config import ParallelConfig
from ossature.model.config import ModelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA_AXES = ("dp_replicate", "dp_shard")
"""Axes whose ranks read different rows."""


def sizes(config: ParallelConfig, world: int) -> dict[str, int]:
    """Ranks along every axis.

    Raises:
        ValueError: the axes do not multiply to `world`, or ep x etp does not divide what it
            borrows from.
    """
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
    lent = given["dp_shard"] * given["cp"] * given["tp"]
    if lent % (config.ep * config.etp):
        raise ValueError(
            f"parallel: ep ({config.ep}) x etp ({config.etp}) must divide dp_shard x cp x tp "
            f"({lent})"
        )
    return given


def check_model(config: ParallelConfig, shape: ModelConfig, seq_len: int) -> None:
    """Whether the axes divide what they split.

    Raises:
        ValueError: one does not; with both numbers.
    """
    splits = [
        ("tp", config.tp, "num_key_value_heads", shape.num_key_value_heads),
        ("tp x cp", config.tp * config.cp, "data.seq_len", seq_len),
        ("ep", config.ep, "num_local_experts", shape.num_local_experts),
        ("etp", config.etp, "intermediate_size", shape.intermediate_size),
    ]
    if config.cp > 1:  # every rank has two chunks, and sequence parallelism splits those
        splits.insert(1, ("2 x cp", 2 * config.cp, "data.seq_len", seq_len))
    for axis, ranks, name, size in splits:
        if size % ranks:
            raise ValueError(f"parallel.{axis} ({ranks}) must divide {name} ({size})")
    if (config.tp - 1) * -(-shape.vocab_size // config.tp) >= shape.vocab_size:
        raise ValueError(
            f"parallel.tp ({config.tp}) must leave every rank a row of vocab_size "
            f"({shape.vocab_size})"
        )


def build(axis_sizes: dict[str, int], device_type: str) -> DeviceMesh:
    """The mesh of all ranks; every axis is there, also those of size 1."""
    shape = tuple(axis_sizes[axis] for axis in AXES)
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)


def dense_view(mesh: DeviceMesh) -> DeviceMesh:
    """(pp, dp_replicate, fsdp, tp), with fsdp = dp_shard x cp."""
    pp, replicate, shard, cp, tp = mesh.shape
    return _view(mesh, pp=pp, dp_replicate=replicate, fsdp=shard * cp, tp=tp)


def expert_view(mesh: DeviceMesh, config: ParallelConfig) -> DeviceMesh:
    """(pp, dp_replicate, efsdp, ep, etp), with efsdp x ep x etp = dp_shard x cp x tp."""
    pp, replicate, *lent = mesh.shape
    efsdp = math.prod(lent) // (config.ep * config.etp)
    return _view(mesh, pp=pp, dp_replicate=replicate, efsdp=efsdp, ep=config.ep, etp=config.etp)


def _view(mesh: DeviceMesh, **axes: int) -> DeviceMesh:
    ranks = mesh.mesh.reshape(tuple(axes.values()))
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=tuple(axes))


def fsdp_mesh(view: DeviceMesh) -> DeviceMesh:
    """The ranks a weight is sharded and, with copies of the model, replicated over.

    Args:
        view: of the dense or of the expert weights.
    """
    assert view.mesh_dim_names is not None
    shards = view.mesh_dim_names[2]
    copies = view["dp_replicate"].size() > 1
    return view["dp_replicate", shards] if copies else view[shards]


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
