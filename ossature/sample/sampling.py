"""Logits -> the next token: greedy, or drawn after temperature, top-k and top-p, in this order.

Logits are filtered and normalised in float32, whatever the model computes in.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def choose(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token a row.

    Args:
        temperature: 0 takes the most probable token.
        top_k: tokens that stay possible, the most probable ones; 0 keeps all.
        top_p: probability that the tokens that stay possible reach together; 1 keeps all.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def keep_top_k(logits: Float[Tensor, "batch vocab"], top_k: int) -> Float[Tensor, "batch vocab"]:
    """-inf for all but the `top_k` largest logits of a row, and those equal to the last of them."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Float[Tensor, "batch vocab"], top_p: float) -> Float[Tensor, "batch vocab"]:
    """-inf for all but the fewest, most probable tokens whose probabilities reach `top_p`.

    The token that crosses `top_p` stays, so at least one token does.
    """
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # of the tokens ahead of each
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    ordered[:, 0] = logits.max(dim=-1).values  # top_p = 0 keeps the most probable
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for numbers that describe no distribution."""
    if not temperature >= 0:
        raise ValueError(f"temperature ({temperature}) must be 0 or more; 0 is greedy")
    if top_k < 0:
        raise ValueError(f"top_k ({top_k}) must be 0 or more; 0 keeps every token")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be between 0 and 1; 1 keeps every token")
