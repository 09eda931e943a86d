"""Head and cross-entropy together, a chunk of tokens at a time.

All logits of 4,096 tokens of gpt-oss are 3.3 GB in fp32.  Here a chunk of them exists at a time,
and its gradient is taken while it exists, so the backward pass computes nothing again: it only
scales.  The softmax is fp32 whatever the dtype of the matrices.

tests/kernels/test_cross_entropy.py ties it to torch's cross_entropy on whole logits.
"""

import torch
from torch import Tensor

_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}  # 64 MiB and 1 GiB in fp32


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over the counted tokens of -log softmax(x @ weight.T)[target], in fp32 (or fp64).

    Args:
        x: (tokens, hidden); weight: (vocab, hidden).
        targets: (tokens,) int64; -100 is not counted.
        chunk_tokens: tokens whose logits exist at a time; default by device and vocabulary.
    """
    if chunk_tokens is None:
        chunk_tokens = max(256, _CHUNK_LOGITS.get(x.device.type, 2**26) // weight.shape[0])
    return _LinearCrossEntropy.apply(x, weight, targets, chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.zeros_like(x) if need_x else None
        # Summed over chunks in fp32: bf16 sums of bf16 products would lose their last bits.
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, len(x), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            target = targets[chunk]
            counted = target != -100
            index = target.masked_fill(~counted, 0)[:, None]
            logits = (x[chunk] @ weight.mT).to(wide)
            lse = logits.logsumexp(-1, keepdim=True)
            loss += (lse - logits.gather(1, index))[:, 0].masked_fill(~counted, 0).sum()
            if not (need_x or need_weight):
                continue
            dlogits = logits.sub_(lse).exp_()
            dlogits.scatter_add_(1, index, torch.full_like(lse, -1.0))
            dlogits = dlogits.mul_(counted[:, None]).to(weight.dtype)
            if dx is not None:
                torch.mm(dlogits, weight, out=dx[chunk])
            if dweight is not None:
                _add_product(dweight, dlogits.mT, x[chunk])
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dx, dweight = (
            None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return dx, dweight, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
