"""Weights that are stored as parts of a whole, and computed with as plain tensors.

What FSDP, checkpoints and clipping see is a DTensor, which knows its place in the whole.  What the
module's own forward sees is the part that this rank has: a smaller weight, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ossature.parallel.collectives import Group, sum_gradient

Use = Callable[[Tensor], Tensor]
"""Of a parameter, each time the module's forward asks for it."""


def split(module: nn.Module, mesh: DeviceMesh, **dims: tuple[int | None, ...]) -> None:
    """Keep of each named parameter only this rank's part.

    Args:
        dims: for every axis of `mesh`, the dim of the parameter it splits; None leaves it whole.
    """
    for name, split_dims in dims.items():
        whole = module.get_parameter(name)
        places = [Replicate() if dim is None else Shard(dim) for dim in split_dims]
        # src_data_rank=None: every rank has the whole and cuts its own part; no communication.
        part = distribute_tensor(whole.detach(), mesh, places, src_data_rank=None)
        module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


def compute_locally(module: nn.Module, **uses: Use) -> None:
    """Give the module's forward this rank's parts, passed through `uses` where they are named.

    They are plain attributes while it runs, which hide the parameters of the same names.
    """

    def before(module: nn.Module, _args: tuple) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            module.__dict__[name] = uses[name](part) if name in uses else part

    def after(module: nn.Module, *_: Any) -> None:
        for name, _parameter in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def summed(group: Group) -> Use:
    """For a weight that all ranks of the group have whole, each using it on tokens of its own."""
    return lambda weight: sum_gradient(weight, group)


def added_once(group: Group) -> Use:
    """For a bias that all ranks of the group have, added to terms of a sum: only the first adds."""
    first = float(dist.get_rank(group) == 0)
    # Times zero and not left out: the sum of the gradients takes all ranks.
    return lambda bias: sum_gradient(bias, group) * first
