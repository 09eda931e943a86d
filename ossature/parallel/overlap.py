"""Products beside a transfer over tp, in pieces, so that one hides the other (async TP).

The sequence is gathered while those parts of it that are there go through the projections, and
terms of a sum are sent off while others are computed: torch's own operators on symmetric memory,
between GPUs that see each other's.  On a CPU the same two functions transfer, then multiply.

Of the two directions each is the other's adjoint, so that the backward pass overlaps too.

Source: torch/distributed/_symmetric_memory of torch 2.11; tests/parallel/test_overlap.py calls the
operators by torch's own fallback for them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from ossature.model.attention import Attention
from ossature.model.rope import Rotation, rotate
from ossature.parallel.collectives import Group, gathered, reduced, sum_gradient
from ossature.parallel.sequence import Sequence


def overlap(attention: Attention, sequence: Sequence) -> None:
    """Let an attention that is divided over tp take and give a rank's own part of the sequence.

    While sampling, where sequences are not divided, it goes on as it was.
    """
    plain = attention.forward
    project, output = attention.project, attention.o_proj.forward

    def forward(x: Tensor, *args, **kwargs) -> Tensor:
        if sequence.divided:
            return plain(x, *args, **kwargs)
        return sequence.part(plain(x, *args, **kwargs))

    def projected(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        if not sequence.divided:
            return project(x, rotation)
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        weights = (_own(linear.weight) for linear in linears)
        products = gather_multiply(x, *weights, group=sequence.group)
        q, k, v = (
            (product + _own(linear.bias)).unflatten(-1, (-1, attention.head_dim))
            for product, linear in zip(products, linears, strict=True)
        )
        return rotate(q, rotation), rotate(k, rotation), v

    def put_together(input: Tensor) -> Tensor:
        if not sequence.divided:
            return output(input)
        part = multiply_scatter(input, attention.o_proj.weight, group=sequence.group)
        # The parameter: the attribute is for terms of a sum, to which one rank adds it.  Here every
        # rank adds it to tokens of its own.
        bias = _own(attention.o_proj._parameters["bias"])
        return part + sum_gradient(bias, sequence.group)

    attention.forward, attention.project = forward, projected
    attention.o_proj.forward = put_together


def gather_multiply(
    x: Float[Tensor, "batch part hidden"], *weights: Float[Tensor, "out hidden"], group: Group
) -> tuple[Tensor, ...]:
    """The whole sequence times each of some matrices: (batch, seq, out), one for each."""
    return _GatherMultiply.apply(x, group, *weights)


def multiply_scatter(
    x: Float[Tensor, "batch seq in"], weight: Float[Tensor, "hidden in"], *, group: Group
) -> Float[Tensor, "batch part hidden"]:
    """A product that is one term of a sum over the ranks -> the sum, on a rank's own tokens."""
    return _MultiplyScatter.apply(x, weight, group)


class _GatherMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group, *weights: Tensor):
        whole, products = _gather_and_multiply(x, [weight.mT for weight in weights], group)
        ctx.save_for_backward(whole, *weights)
        ctx.group = group
        return tuple(products)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        whole, *weights = ctx.saved_tensors
        dx = _multiply_and_scatter(torch.cat(grads, -1), torch.cat(weights), ctx.group)
        return dx, None, *(grad.flatten(0, 1).mT @ whole.flatten(0, 1) for grad in grads)


class _MultiplyScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return _multiply_and_scatter(x, weight.mT, group)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight = ctx.saved_tensors
        whole, (dx,) = _gather_and_multiply(grads[0], [weight], ctx.group)
        return dx, whole.flatten(0, 1).mT @ x.flatten(0, 1), None


def _gather_and_multiply(
    x: Tensor, matrices: list[Tensor], group: Group
) -> tuple[Tensor, list[Tensor]]:
    if _has_operators(x):
        return torch.ops.symm_mem.fused_all_gather_matmul(x, matrices, 1, group.group_name)
    whole = gathered(x, 1, group)
    return whole, [whole @ matrix for matrix in matrices]


def _multiply_and_scatter(x: Tensor, matrix: Tensor, group: Group) -> Tensor:
    if _has_operators(x):
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, matrix, "sum", 1, group.group_name)
    return reduced(x @ matrix, 1, group)


def _has_operators(x: Tensor) -> bool:
    return x.is_cuda


def _own(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
