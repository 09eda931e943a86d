"""RMSNorm that keeps only its input for the backward pass.

Everything between load and store is fp32, the multiplication with the weight included: the cast
comes last.  Autograd of the plain formula would keep three fp32 copies of the input.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x ** 2) + eps) over the last dim, in fp32 (or fp64), cast to x's."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (weight.to(wide.dtype) * (wide * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        dy = grads[0].to(scale.dtype)
        dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        dnormed = dy * weight.to(scale.dtype)
        mean = (dnormed * normed).mean(-1, keepdim=True)
        return ((dnormed - normed * mean) * scale).to(x.dtype), dweight, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
