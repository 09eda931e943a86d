"""The norm of the whole gradient, and clipping by it, over parameters on any meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(
    parameters: Iterable[nn.Parameter], mesh: DeviceMesh | None = None
) -> Float[Tensor, ""]:
    """2-norm of all gradients together, the same on every rank; no host synchronisation.

    Squares are added over the mesh axes a gradient is sharded on and no others: a replicated
    gradient counts once.

    Args:
        mesh: of the run; ranks of its axis pp have different parameters.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            # FSDP's shards of shards are of a private class of their own.
            split = [n for n, place in enumerate(gradient.placements) if not place.is_replicate()]
            groups[gradient.device_mesh, tuple(split)].append(gradient.to_local())
        elif gradient is not None:
            groups[None, ()].append(gradient)
    squares = []
    for (where, axes), gradients in groups.items():
        square = square_norm(gradients)
        for axis in axes:
            if where.size(axis) > 1:
                dist.all_reduce(square, group=where.get_group(axis))
        squares.append(square)
    total = torch.stack(squares).sum()
    if mesh is not None and mesh["pp"].size() > 1:
        dist.all_reduce(total, group=mesh.get_group("pp"))
    return total.sqrt().float()


def square_norm(gradients: list[Tensor]) -> Tensor:
    """Row by row, then in fp64: one fp32 sum over millions of numbers is off by 7e-4 on CPU."""
    rows = [
        torch.linalg.vector_norm(g if g.dtype == torch.float64 else g.float(), dim=-1).flatten()
        for g in gradients
        if g.numel()
    ]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    return torch.cat(rows).double().square().sum()


def scale_and_clip(
    parameters: Iterable[nn.Parameter], norm: Float[Tensor, ""], clip: float, scale: float
) -> None:
    """Divide every gradient by `scale`, then by what makes their global norm at most `clip`.

    Args:
        norm: of the gradients as they are, before the division.
        clip: 0 does not clip.
    """
    factor = torch.ones_like(norm) / scale
    if clip:
        factor = factor * (clip / (norm / scale + 1e-6)).clamp(max=1.0)
    elif scale == 1.0:
        return
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
