"""Fill a sharded model with values that are known whole, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ossature.model.init import initial_weight
from ossature.model.transformer import Transformer


@torch.no_grad()
def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Set every parameter to `read(name)`, the whole tensor; each rank keeps its own part.

    Every rank reads every tensor, and holds one at a time.  No communication.

    Raises:
        ValueError: a shape differs.
    """
    for name, parameter in model.named_parameters():
        whole = read(name)
        if whole.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(whole.shape)}, the model needs {tuple(parameter.shape)}"
            )
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank cuts its part from its own copy.
            whole = whole.to(parameter.device, parameter.dtype)
            whole = distribute_tensor(
                whole, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(whole)


def initialise(model: Transformer, seed: int) -> None:
    """Draw the weights; they depend on the seed and their names, never on the number of ranks."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fill(model, lambda name: initial_weight(model.config, name, shapes[name], seed))
