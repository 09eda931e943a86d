"""Data parallelism: by shards (FSDP), by copies (DDP), or by copies of shards (HSDP).

All three are FSDP2 on the mesh (dp_replicate, dp_shard x cp).  Copies alone are shards of a group
of one rank: nothing is gathered or scattered, and each block's gradients are added up over the
copies by one all-reduce while the backward goes on.

Gradients are *summed* over the ranks, never averaged: each rank's loss is already divided by the
number of counted tokens of all ranks, the only divisor that is right when loss masks are ragged.
FSDP's own division is switched off by the factor 1.0, and `force_sum` makes that hold on every
backend and for groups of any size (other factors divide twice on a group of one rank in torch
2.13, and gloo has no pre-multiplied sum).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard

from ossature.config import ParallelConfig, TrainConfig
from ossature.model.transformer import Transformer
from ossature.parallel.gradients import local
from ossature.parallel.masters import MastersModule
from ossature.parallel.mesh import dense_view, fsdp_mesh
from ossature.parallel.stages import Stage

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shard(
    model: Transformer | Stage,
    mesh: DeviceMesh,
    config: TrainConfig,
    experts: DeviceMesh | None = None,
) -> None:
    """Shard the weights in place: one group per block, the rest in the root's.

    A block's weights are gathered, in the compute dtype, for its own forward and backward.
    Masters and gradients are fp32.

    Args:
        experts: view of the experts' ranks, if they are others than those of the dense weights;
            the experts of a block are then a group of their own.
    """
    precision, axes = config.precision, config.parallel
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == "fp32" else COMPUTE_DTYPE[precision],
        reduce_dtype=COMPUTE_DTYPE[axes.reduce_dtype],
        # The angles of RoPE enter each block in fp32 and have to stay so.
        cast_forward_inputs=False,
    )
    offload = OffloadPolicy()
    if axes.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    drop = axes.reshard_after_forward == "always"
    if axes.reshard_after_forward == "auto":
        # A stage keeps its weights for all of its micro-batches.
        drop = mesh["pp"].size() == 1

    def group(module: nn.Module, where: DeviceMesh, place: Place | None = None) -> FSDPModule:
        # On one rank nothing is saved by dropping weights: their masters are there as well.
        again = drop and where.shape[-1] > 1
        # Nor is anything gained by gathering, on one rank, what is frozen: it would be there twice.
        frozen = {p for p in module.parameters() if not p.requires_grad}
        ignored = where.shape[-1] == 1 and not axes.cpu_offload
        fully_shard(
            module,
            mesh=where,
            mp_policy=policy,
            # The root's are needed again as soon as its forward ends.
            reshard_after_forward=None if module is model else again,
            shard_placement_fn=place,
            ignored_params=frozen if ignored else None,
            offload_policy=offload,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(again, recurse=False)  # else `release` drops them
        return module

    where = fsdp_mesh(dense_view(mesh))
    in_order: list[list[FSDPModule]] = []  # by block
    for block in model.blocks.values():
        groups = [group(block, where)] if experts is None else []
        if experts is not None:
            apart = fsdp_mesh(experts)
            inner = group(block.get_submodule("moe.experts"), apart, _even(apart.shape[-1]))
            groups = [group(block, where), inner]
        in_order.append(groups)
    _prefetch(group(model, where), in_order, axes.prefetch_blocks)


def alone(ranks: int, config: TrainConfig) -> bool:
    """Whether one rank has it all, in fp32, on its device: `keep_masters` then does."""
    return ranks == 1 and config.optim.weights == "fp32" and not config.parallel.cpu_offload


def _prefetch(root: FSDPModule, in_order: list[list[FSDPModule]], blocks: int) -> None:
    """Gather weights ahead by so many blocks: forward from the root on, backward from the last."""
    if not blocks:
        return
    backward = in_order[::-1]
    root.set_modules_to_forward_prefetch([*itertools.chain(*in_order[:blocks])])
    root.set_modules_to_backward_prefetch([*itertools.chain(*backward[:blocks])])
    for n, (block, *experts) in enumerate(in_order):
        after, before = in_order[n + 1 :][:blocks], backward[len(in_order) - n :][:blocks]
        block.set_modules_to_forward_prefetch([*experts, *itertools.chain(*after)])
        block.set_modules_to_backward_prefetch([*experts, *itertools.chain(*before)])


Place = Callable[[nn.Parameter], Shard | None]
"""The dim that a parameter is sharded along; None is the first."""


def _even(ranks: int) -> Place:
    """The experts if they divide evenly, else what is inside of them, if that does."""

    def place(parameter: nn.Parameter) -> Shard | None:
        experts, size = local(parameter).shape[:2]
        return Shard(1) if experts % ranks and size % ranks == 0 else None

    return place


def sharded(model: nn.Module) -> list[FSDPModule]:
    """Every module that has a group of its own."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """For forwards that no backward follows: drops the gathered weights at the end.

    Where weights stay gathered between forward and backward they would stay so for good.
    """
    try:
        yield
    finally:
        release(model)


def release(model: nn.Module) -> None:
    """Drop what is still gathered.

    Until then `named_parameters` names the gathered copies, in the compute dtype, and not the
    masters; and a step of the masters would leave the copies as they are.
    """
    for module in sharded(model):
        module.reshard()
    if isinstance(model, MastersModule):
        model.use_masters()


def reduce_gradients_now(model: nn.Module, last: bool, axes: ParallelConfig) -> None:
    """Before the forward of each micro-batch: whether its backward reduces over the ranks.

    The last one does; until then gradients add up where they are.
    """
    if not isinstance(model, FSDPModule):  # one rank, with nothing to reduce
        return
    model.set_requires_gradient_sync(last or axes.reduce_every_micro_batch)
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)
