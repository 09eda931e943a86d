"""Data parallelism by shards: FSDP, and HSDP where the model is also copied.

Gradients are *summed* over the ranks, never averaged: each rank's loss is already divided by the
number of counted tokens of all ranks, the only divisor that is right when loss masks are ragged.
FSDP's own division is switched off by the factor 1.0, and `force_sum` makes that hold on every
backend and for groups of any size (other factors divide twice on a group of one rank in torch
2.13, and gloo has no pre-multiplied sum).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ossature.model.transformer import Transformer
from ossature.parallel.mesh import dense_view, fsdp_mesh

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def shard(model: Transformer, mesh: DeviceMesh, precision: str) -> None:
    """Shard the weights in place: one group per block, the rest in the root's.

    A block's weights are gathered, in the compute dtype, for its own forward and backward.
    Masters, gradients and their reduction are fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision == "fp32" else COMPUTE_DTYPE[precision],
        reduce_dtype=torch.float32,
        # The angles of RoPE enter each block in fp32 and have to stay so.
        cast_forward_inputs=False,
    )
    where = fsdp_mesh(dense_view(mesh))
    # On one rank nothing is saved by dropping the weights after the forward pass.
    reshard = where.shape[-1] > 1
    for block in model.blocks.values():
        fully_shard(block, mesh=where, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=where, mp_policy=policy)
    for module in sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


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
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(now)
    model.set_is_last_backward(now)
