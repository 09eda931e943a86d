"""Head and cross-entropy together, a chunk of tokens at a time.

All logits of 4,096 tokens of gpt-oss are 3.3 GB in fp32.  Here a chunk of them exists at a time,
and its gradient is taken while it exists, so the backward pass computes nothing again: it only
scales.  The softmax is fp32 whatever the dtype of the matrices.

tests/kernels/test_cross_entropy.py ties it to torch's cross_entropy on whole logits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LossAndGradient = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(logits, targets, dtype of the softmax) -> the summed loss; logits become its gradient."""

# Logits that exist at a time, in the dtype of the matrices; and those of them that are widened to
# fp32 at a time, few enough for a CPU's cache.
_CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**28}
_WIDE_LOGITS = {"cpu": 2**19, "cuda": 2**28}


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    chunk_loss: LossAndGradient | None = None,
    low: Tensor | None = None,
    b: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Sum over the counted tokens of -log softmax(x @ weight.T)[target], in fp32 (or fp64).

    With an adapter the logits are gain * (x @ weight.T + low @ b.T).

    Args:
        x: (tokens, hidden); weight: (vocab, hidden).
        targets: (tokens,) int64; -100 is not counted.
        chunk_tokens: tokens whose logits exist at a time; default by device and vocabulary.
        chunk_loss: of a chunk; for a weight that has only some rows of the vocabulary.
        low: (tokens, rank); b: (vocab, rank); gain: (vocab,).
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(x.device.type, weight.shape[0])
    return _LinearCrossEntropy.apply(
        x, weight, targets, chunk_tokens, chunk_loss or loss_and_gradient, low, b, gain
    )


def default_chunk_tokens(device_type: str, vocab: int) -> int:
    return max(256, _CHUNK_LOGITS.get(device_type, 2**26) // vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        chunk_loss: LossAndGradient,
        low: Tensor | None,
        b: Tensor | None,
        gain: Tensor | None,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        need_low, need_b, need_gain = ctx.needs_input_grad[5:]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        # Summed over chunks in fp32: bf16 sums of bf16 products would lose their last bits.
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        dlow = torch.empty_like(low) if low is not None and need_low else None
        db = torch.zeros_like(b, dtype=wide) if b is not None and need_b else None
        dgain = torch.zeros_like(gain, dtype=wide) if gain is not None and need_gain else None
        buffer = x.new_empty(min(chunk_tokens, len(x)), len(weight))
        for start in range(0, len(x), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = torch.mm(x[chunk], weight.mT, out=buffer[: len(x[chunk])])
            if low is not None and b is not None:
                logits.addmm_(low[chunk], b.mT)
            plain = None
            if gain is not None:
                plain = logits.clone()
                logits.mul_(gain)
            loss += chunk_loss(logits, targets[chunk], wide)
            if plain is not None and gain is not None:
                if dgain is not None:
                    dgain += plain.mul_(logits).sum(0, dtype=wide)
                logits.mul_(gain)
            if dlow is not None and b is not None:
                torch.mm(logits, b, out=dlow[chunk])
            if db is not None and low is not None:
                _add_outer(db, logits, low[chunk])
            if dx is not None:
                torch.mm(logits, weight, out=dx[chunk])
            if dweight is not None:
                _add_outer(dweight, logits, x[chunk])
        dweight, db, dgain = (None if y is None else y.to(x.dtype) for y in (dweight, db, dgain))
        ctx.save_for_backward(dx, dweight, dlow, db, dgain)
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dloss,) = grads
        dx, dweight, *adapter = (
            None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return dx, dweight, None, None, None, *adapter


def loss_and_gradient(logits: Tensor, targets: Tensor, wide: torch.dtype) -> Tensor:
    """The summed loss; logits are overwritten with its gradient."""
    counted = targets != -100
    index = targets.masked_fill(~counted, 0)[:, None]
    loss = torch.zeros((), dtype=wide, device=logits.device)
    rows = max(1, _WIDE_LOGITS.get(logits.device.type, 2**24) // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_probability = logits[part].to(wide).log_softmax(-1)
        loss -= log_probability.gather(1, index[part])[:, 0].masked_fill(~counted[part], 0).sum()
        gradient = log_probability.exp_()
        gradient.scatter_add_(1, index[part], gradient.new_full((), -1.0).expand(len(gradient), 1))
        logits[part] = gradient.mul_(counted[part, None])
    return loss


def _add_outer(total: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """total += dlogits.T @ x, by slices of the vocabulary: one large transposed product is slow."""
    for rows, part in zip(total.split(4096), dlogits.split(4096, dim=1), strict=True):
        rows += part.mT @ x
