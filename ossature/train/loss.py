"""The loss of a language model: summed over the counted tokens, divided by their global number.

`shift` is the one place where targets are shifted; nothing before or after it shifts again.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ossature.model.moe import RouterLog


def language_model_loss(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"] | None = None,
    *,
    position: Int[Tensor, "batch seq"] | None = None,
    document: Int[Tensor, "batch seq"] | None = None,
    count: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, in fp32, without ever holding all logits.

    Router losses are not included.  It goes through `model(...)` itself, so that hooks of sharded
    models run.

    Args:
        loss_mask: True where the token itself is a target; default: every token.  The first token
            of a row or document never is one.
        position, document: as in `Transformer.forward`.
        count: what the sum is divided by; default: the counted targets of this call.  With
            several micro-batches or ranks it is the number over all of them.
    """
    targets = shift(tokens, loss_mask, document)
    total = model(tokens, position=position, document=document, targets=targets)
    if count is None:
        count = (targets >= 0).sum().clamp(min=1)
    return total / count


def shift(
    tokens: Int[Tensor, "batch seq"],
    loss_mask: Bool[Tensor, "batch seq"] | None = None,
    document: Int[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch seq"]:
    """The token to predict from each place: the next one, or -100 where there is none to count.

    There is none at the end of a row, at the end of a document, in padding, and where the next
    token is masked out.
    """
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if loss_mask is not None:
        counted = counted & loss_mask[:, 1:]
    if document is not None:
        counted = counted & (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:].masked_fill(~counted, -100)
    return targets


def router_loss(
    log: RouterLog, *, aux_loss: float, z_loss: float, num_experts_per_tok: int
) -> Float[Tensor, ""]:
    """Coefficients times losses of one forward pass, averages over its tokens and layers.

    The load-balancing loss is experts * sum(share of hits * mean probability), both averaged over
    all layers before the product; perfect balance gives num_experts_per_tok, never less.
    The z-loss is the mean of logsumexp(logits) ** 2 (arXiv 2202.08906).

    Source: `load_balancing_loss_func` of transformers (Mixtral), arXiv 2101.03961 section 2.2.
    """
    tokens = torch.stack([layer.tokens for layer in log.layers]).sum().clamp(min=1)
    hits = torch.stack([layer.counts for layer in log.layers]).sum(0) / tokens
    probability = torch.stack([layer.probability for layer in log.layers]).sum(0) / tokens
    balance = len(hits) * (hits * probability).sum()
    z = torch.stack([layer.z for layer in log.layers]).sum() / tokens
    return aux_loss * balance + z_loss * z
