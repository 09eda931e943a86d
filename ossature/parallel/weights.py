"""Fill a sharded model with values that are known whole, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ossature.model.init import initial_weight
from ossature.model.transformer import Transformer
from ossature.parallel.gradients import local


@torch.no_grad()
def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Set every parameter to `read(name)`, the whole tensor; each rank keeps its own part.

    Every rank reads every tensor, and holds one at a time.  No communication.

    Raises:
        ValueError: a shape differs.
    """
    for name, parameter in model.named_parameters():
        whole = read(name)
        if whole.dtype == torch.uint8:
            whole = whole.view(parameter.dtype)  # as `ossature.parallel.packed` stores bytes
        if whole.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(whole.shape)}, the model needs {tuple(parameter.shape)}"
            )
        local(parameter).copy_(own_part(whole, parameter))


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this rank has of a tensor that is stored as `parameter` is.

    The axes of its mesh are taken from the last to the first: FSDP comes first in the mesh, and
    shards what tp, ep and etp have left.
    """
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    for axis in reversed(range(mesh.ndim)):
        place = parameter.placements[axis]
        if not place.is_replicate():
            dim = place.dim  # pyright: ignore[reportAttributeAccessIssue]
            size = -(-whole.shape[dim] // mesh.size(axis))  # as torch.chunk does
            start = min(size * mesh.get_local_rank(axis), whole.shape[dim])
            whole = whole.narrow(dim, start, min(size, whole.shape[dim] - start))
    return whole


def initialise(model: Transformer, seed: int) -> None:
    """Draw the weights; they depend on the seed and their names, never on the number of ranks."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fill(model, lambda name: initial_weight(model.config, name, shapes[name], seed))
