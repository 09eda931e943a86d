"""Data parallelism by shards: FSDP, and HSDP where the model is also copied.

Gradients are *summed* over the ranks, never averaged: each rank's loss is already divided by the
number of counted tokens of all ranks, the only divisor that is right when loss masks are ragged.
FSDP's own division is switched off by the factor 1.0, and `force_sum` makes that hold on every
backend and for groups of any size (other factors divide twice on a group of one rank in torch
2.13, and gloo has no pre-multiplied sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ossature.model.transformer import Transformer
from ossature.parallel.gradients import local
from ossature.parallel.mesh import dense_view, fsdp_mesh
from ossature.parallel.stages import Stage

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shard(
    model: Transformer | Stage, mesh: DeviceMesh, precision: str, experts: DeviceMesh | None = None
) -> None:
    """Shard the weights in place: one group per block, the rest in the root's.

    A block's weights are gathered, in the compute dtype, for its own forward and backward.
    Masters, gradients and their reduction are fp32.

    Args:
        experts: view of the experts' ranks, if they are others than those of the dense weights;
            the experts of a block are then a group of their own.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == "fp32" else COMPUTE_DTYPE[precision],
        reduce_dtype=torch.float32,
        # The angles of RoPE enter each block in fp32 and have to stay so.
        cast_forward_inputs=False,
    )

    def group(module: nn.Module, where: DeviceMesh, place: Place | None = None) -> None:
        # On one rank nothing is saved by dropping the weights after the forward pass.  A stage
        # keeps them for all of its micro-batches: gathering them for each would cost as many times.
        again = where.shape[-1] > 1 and mesh["pp"].size() == 1
        again = None if module is model else again
        # Nor is anything gained by gathering, on one rank, what is frozen: it would be there twice.
        frozen = {p for p in module.parameters() if not p.requires_grad}
        fully_shard(
            module,
            mesh=where,
            mp_policy=policy,
            reshard_after_forward=again,
            shard_placement_fn=place,
            ignored_params=frozen if where.shape[-1] == 1 else None,
        )

    where = fsdp_mesh(dense_view(mesh))
    for block in model.blocks.values():
        if experts is not None:
            apart = fsdp_mesh(experts)
            group(block.get_submodule("moe.experts"), apart, _even(apart.shape[-1]))
        group(block, where)
    group(model, where)
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


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

    Where weights stay gathered between forward and backward they would stay so for good, and
    `named_parameters` would name the gathered copies, in the compute dtype, and not the masters.
    """
    try:
        yield
    finally:
        for module in sharded(model):
            module.reshard()


def reduce_gradients_now(model: nn.Module, now: bool) -> None:
    """Whether the next backward reduces over the ranks; until it does, gradients add up locally."""
    if not isinstance(model, FSDPModule):  # one rank that steps its weights during backward
        return
    model.set_requires_gradient_sync(now)
    model.set_is_last_backward(now)
