"""Mixture of experts: a biased router, the top k, and clamped SwiGLU experts with biases.

Selection comes before the softmax: the weights of a token's experts are the softmax of the k
chosen logits.  Rows of `gate_up` alternate: gate, up, gate, up.  Weights are (experts, out, in).

`eager_experts` is the specification; `ossature.kernels.experts` sorts the tokens by expert and
multiplies in groups.  No token is dropped.

Source: gpt_oss/torch/model.py of openai/gpt-oss@7b58334.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ossature.kernels.experts import (
    combine,
    dispatch,
    few_experts,
    grouped_experts,
    sort_by_expert,
)
from ossature.model.attention import Form
from ossature.model.config import ModelConfig


class RouterStatistics(NamedTuple):
    """Sums over the tokens of one layer that are no padding."""

    counts: Int[Tensor, " experts"]
    """Tokens sent to each expert; adds up to tokens x k."""
    probability: Float[Tensor, " experts"]
    """Softmax over all experts, summed; differentiable."""
    z: Float[Tensor, ""]
    """logsumexp(logits) ** 2, summed; differentiable."""
    entropy: Float[Tensor, ""]
    """Entropy of the softmax over all experts, in nats, summed."""
    tokens: Int[Tensor, ""]


class RouterLog:
    """Collects the statistics of a forward pass, one entry a layer, first layer first.

    Handed to the model, which fills it outside of what activation checkpointing runs again: a
    token is counted once.
    """

    def __init__(self) -> None:
        self.layers: list[RouterStatistics] = []


class Router(nn.Module):
    """Scores every expert for every token, in fp32 whatever the dtype of the rest."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_local_experts))
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", None)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], counted: Bool[Tensor, " tokens"] | None
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"], RouterStatistics | None]:
        """The experts of each token, largest logit first, their weights, and statistics.

        Args:
            counted: tokens that take part in the statistics; None computes none.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = self.score(x.to(wide))
        chosen = self.select(logits)
        weights = logits.gather(-1, chosen).softmax(-1)
        statistics = None if counted is None else router_statistics(logits, chosen, counted)
        return chosen, weights.to(x.dtype), statistics

    def score(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def select(self, logits: Float[Tensor, "tokens experts"]) -> Int[Tensor, "tokens k"]:
        """The balancing bias, if there is one, takes part in the choice and not in the weights."""
        if self.balance_bias is not None:
            logits = logits + self.balance_bias
        return logits.topk(self.num_experts_per_tok, dim=-1).indices


FEW = 64
"""Up to so many tokens, as sampling has them, a layer's time is that of reading its weights."""


class Experts(nn.Module):
    """All experts of a layer; each parameter holds one slice per expert."""

    def __init__(self, config: ModelConfig, form: Form) -> None:
        super().__init__()
        experts, hidden = config.num_local_experts, config.hidden_size
        inner = config.intermediate_size
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.form: Form = form
        self.compute = grouped_experts
        """What the fast form calls; other products can be put in its place."""
        self.gate_up_weight = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.gate_up_bias = nn.Parameter(torch.empty(experts, 2 * inner))
        self.down_weight = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_bias = nn.Parameter(torch.empty(experts, hidden))

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of each token's experts."""
        matrices = self.gate_up_weight, self.gate_up_bias, self.down_weight, self.down_bias
        if self.form == "eager":
            return eager_experts(x, chosen, weights, *matrices, self.alpha, self.limit)
        if len(x) <= FEW and x.device.type == "cpu" and not torch.is_grad_enabled():
            return few_experts(x, chosen, weights, *matrices, self.alpha, self.limit)
        order, counts = sort_by_expert(chosen, self.gate_up_weight.shape[0])
        rows = dispatch(x, order, chosen.shape[1])
        rows = self.compute(
            rows, weights.flatten()[order], counts, *matrices, self.alpha, self.limit
        )
        return combine(rows, order, chosen.shape[1])


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, form: Form) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config, form)

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], counted: Bool[Tensor, "batch seq"] | None
    ) -> tuple[Float[Tensor, "batch seq hidden"], RouterStatistics | None]:
        tokens = x.flatten(0, 1)
        counted = None if counted is None else counted.flatten()
        chosen, weights, statistics = self.router(tokens, counted)
        return self.experts(tokens, chosen, weights).view_as(x), statistics


def swiglu(
    gate_up: Float[Tensor, "tokens two_inner"], alpha: float, limit: float
) -> Float[Tensor, "tokens inner"]:
    """gate * sigmoid(alpha * gate) * (up + 1); the gate is clamped from above only, up both ways.

    The clamps act on what goes in, not on what comes out.
    """
    gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def eager_experts(
    x: Float[Tensor, "tokens hidden"],
    chosen: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    gate_up_weight: Float[Tensor, "experts two_inner hidden"],
    gate_up_bias: Float[Tensor, "experts two_inner"],
    down_weight: Float[Tensor, "experts hidden inner"],
    down_bias: Float[Tensor, "experts hidden"],
    alpha: float,
    limit: float,
) -> Float[Tensor, "tokens hidden"]:
    """The specification: one expert after the other, on the tokens that chose it.

    The weighting covers the down bias too.
    """
    out = torch.zeros_like(x)
    # unbind and not [expert]: its backward writes one gradient, not a full-size one per expert.
    matrices = zip(
        gate_up_weight.unbind(), gate_up_bias.unbind(), down_weight.unbind(), down_bias.unbind(),
        strict=True,
    )  # fmt: skip
    for expert, (gate_up, gate_up_b, down, down_b) in enumerate(matrices):
        token, slot = torch.where(chosen == expert)
        inner = swiglu(F.linear(x[token], gate_up, gate_up_b), alpha, limit)
        y = F.linear(inner, down, down_b) * weights[token, slot][:, None]
        out = out.index_add(0, token, y)
    return out


def router_statistics(
    logits: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens k"],
    counted: Bool[Tensor, " tokens"],
) -> RouterStatistics:
    experts = logits.shape[-1]
    hits = F.one_hot(chosen, experts).sum(1)  # (tokens, experts)
    log_probability = logits.log_softmax(-1)
    probability = log_probability.exp() * counted[:, None]
    return RouterStatistics(
        counts=(hits * counted[:, None]).sum(0),
        probability=probability.sum(0),
        z=(logits.logsumexp(-1).square() * counted).sum(),
        entropy=-(probability * log_probability).sum().detach(),
        tokens=counted.sum(),
    )
