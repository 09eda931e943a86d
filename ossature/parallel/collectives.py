"""Collectives that autograd understands, on plain tensors: each names what it does both ways.

Which adjoint is right depends on what the ranks hold.  After `gather` every rank goes on with the
whole and works on something different (its heads, its slice of the vocabulary), so the gradients
of the whole add up: `reduce_scatter`.  After `gather_same` every rank does the same work on the
whole, so each already has the full gradient of its own part.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """All ranks' parts, put together along `dim`; the gradients of the whole are added up."""
    return _Gather.apply(x, dim, group)


def gather_same(x: Tensor, dim: int, group: Group) -> Tensor:
    """All ranks' parts, put together along `dim`; a rank keeps the gradient of its own part."""
    return _GatherSame.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Add up over the ranks, and keep this rank's part along `dim`; the adjoint of `gather`."""
    return _ReduceScatter.apply(x, dim, group)


def sum_ranks(x: Tensor, group: Group) -> Tensor:
    """Add up over the ranks, which all go on with the same sum: the gradient passes unchanged."""
    return _Sum.apply(x, group)


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """x itself; its gradient is added up over the ranks, in fp32 at least.

    For a weight that all ranks have whole, each using it on tokens of its own.
    """
    return _SumGradient.apply(x, group)


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """Rows (dim 0) to every rank, `sent` of them, and from every rank, `received` of them."""
    return _AllToAll.apply(x, received, sent, group)


def own_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's part of a whole, as `gather` puts it together."""
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return reduced(grads[0], ctx.dim, ctx.group), None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return gathered(x, dim, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return own_part(grads[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduced(x, dim, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return gathered(grads[0], ctx.dim, ctx.group), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dx,) = grads
        wide = torch.float64 if dx.dtype == torch.float64 else torch.float32
        total = dx.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.to(dx.dtype), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchanged(x, received, sent, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return _exchanged(grads[0], ctx.sent, ctx.received, ctx.group), None, None, None


def gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    """`gather` without gradients."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(parts, x.contiguous(), group=group)
    return parts if dim == 0 else torch.cat(parts.chunk(ranks), dim)


def reduced(x: Tensor, dim: int, group: Group) -> Tensor:
    """`reduce_scatter` without gradients."""
    ranks = dist.get_world_size(group)
    parts = x if dim == 0 else torch.cat(x.chunk(ranks, dim))
    out = parts.new_empty(parts.shape[0] // ranks, *parts.shape[1:])
    _reduce_scatter(out, parts.contiguous(), group=group)
    return out


def _exchanged(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


# torch 2.13 has new names for the same two, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
