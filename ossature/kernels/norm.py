"""RMSNorm that keeps only its input for the backward pass.

Everything between load and store is fp32, the multiplication with the weight included: the cast
comes last.  Autograd of the plain formula would keep three fp32 copies of the input.  On CPU rows
are taken in blocks, so that what is widened stays in the cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x ** 2) + eps) over the last dim, in fp32 (or fp64), cast to x's."""
    if torch.is_grad_enabled() or x.numel() > BLOCK:
        return _RMSNorm.apply(x, weight, eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


BLOCK = 2**17
"""Numbers that are worked on at a time on a CPU."""


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows, y = x.flatten(0, -2), torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = rows.new_empty(len(rows), 1, dtype=wide)
        out, factor = y.view(rows.shape), weight.to(wide)
        for block in _blocks(rows):
            part = rows[block].to(wide)
            scale[block] = part.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            out[block] = part * scale[block] * factor
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, weight, scale = ctx.saved_tensors
        rows, dy = x.flatten(0, -2), grads[0].flatten(0, -2)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        out, factor = dx.view(rows.shape), weight.to(scale.dtype)
        dweight = torch.zeros_like(factor)
        for block in _blocks(rows):
            normed = rows[block].to(scale.dtype) * scale[block]
            part = dy[block].to(scale.dtype)
            product = part * normed
            dweight += product.sum(0)
            mean = (product @ factor / len(factor))[:, None]
            out[block] = (part * factor).addcmul_(normed, mean, value=-1).mul_(scale[block])
        return dx, dweight.to(weight.dtype), None


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of rows of about `BLOCK` numbers; on CUDA one of all."""
    size = max(1, BLOCK // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return (slice(start, start + size) for start in range(0, len(rows), size))
