"""Fill a sharded model, each rank its own parts; no communication."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ossature.checkpoint.box import Box, shape_of, whole
from ossature.model.init import initial_weight
from ossature.model.transformer import Transformer
from ossature.parallel.gradients import local


def fill(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Set every parameter to `read(name)`, the whole tensor; each rank keeps its own part.

    Every rank reads every tensor, and holds one at a time: for tensors that are there already.

    Raises:
        ValueError: a shape differs.
    """
    wanted = dict(model.named_parameters())

    def part(name: str, box: Box) -> Tensor:
        given, shape = read(name), tuple(wanted[name].shape)
        if given.dtype == torch.uint8:
            given = given.view(wanted[name].dtype)  # as `ossature.parallel.packed` stores bytes
        if given.shape != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}, the model needs {shape}")
        return given[box]

    fill_parts(model, part)


@torch.no_grad()
def fill_parts(model: nn.Module, read: Callable[[str, Box], Tensor]) -> None:
    """Set this rank's part of every parameter to `read(name, box)`: a box of the whole tensor."""
    for name, parameter in model.named_parameters():
        box = own_box(parameter)
        if local(parameter).numel():
            local(parameter).copy_(read(name, box))


def own_box(parameter: Tensor) -> Box:
    """Where in the whole tensor this rank's part of it lies.

    The axes of its mesh are taken from the last to the first: FSDP comes first in the mesh, and
    shards what tp, ep and etp have left.
    """
    box = list(whole(tuple(parameter.shape)))
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            place = parameter.placements[axis]
            if not place.is_replicate():
                dim = place.dim  # pyright: ignore[reportAttributeAccessIssue]
                start, stop = box[dim].start, box[dim].stop
                size = -(-(stop - start) // mesh.size(axis))  # as torch.chunk does
                start = min(start + size * mesh.get_local_rank(axis), stop)
                box[dim] = slice(start, min(start + size, stop))
        assert shape_of(tuple(box)) == parameter.to_local().shape, f"{box} of {parameter.shape}"
    return tuple(box)


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this rank has of a tensor that is stored as `parameter` is."""
    return whole[own_box(parameter)]


def initialise(model: Transformer, seed: int) -> None:
    """Draw the weights; they depend on the seed and their names, never on the number of ranks.

    Of experts a rank draws its own alone; any other matrix takes the numbers before it, so it is
    drawn whole, one at a time.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fill_parts(model, lambda n, box: initial_weight(model.config, n, shapes[n], seed, box))
