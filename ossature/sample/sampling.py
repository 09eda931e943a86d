"""Logits -> the next token of one text: the most probable, or drawn by a generator of its own.

Logits are filtered and normalised in float32, whatever the model computes in.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ossature.sample.options import SamplingOptions

COLDEST, HOTTEST = 1e-20, 1e20
"""Temperatures beyond are taken as these: by others, logits in float32 may come out as no numbers
(-inf is divided too)."""


class Sampler:
    """Chooses the tokens of one text.  Nothing of other texts takes part in it.

    Args:
        seed: of the draws.
    """

    def __init__(
        self, options: SamplingOptions, seed: int, prompt: list[int], vocab_size: int
    ) -> None:
        self.options = options
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        differences = options.presence_penalty != 0 or options.frequency_penalty != 0
        self.penalises = options.repetition_penalty != 1 or differences
        self.plain = options.temperature == 0 and not (self.penalises or options.logit_bias)
        """Whether the token is the most probable one, unless there is a constraint."""
        if self.penalises:
            self.said = torch.zeros(vocab_size)  # times, in the text
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)  # there, or in the prompt
            self.seen[prompt] = True
        if options.logit_bias:
            tokens, values = zip(*options.logit_bias, strict=True)
            self.bias = torch.zeros(vocab_size).index_add(
                0, torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)
            )

    def accept(self, token: int) -> None:
        """The text goes on with this token."""
        if self.penalises:
            self.said[token] += 1
            self.seen[token] = True

    def choose(
        self, logits: Float[Tensor, " vocab"], allowed: Bool[Tensor, " vocab"] | None = None
    ) -> int:
        """The next token.

        Args:
            allowed: tokens that a constraint lets through.

        Raises:
            ValueError: the model gives none of these tokens any probability.
        """
        options, logits = self.options, logits.float()
        if options.logit_bias:
            logits = logits + self.bias.to(logits.device)
        if self.penalises:
            seen, said = self.seen.to(logits.device), self.said.to(logits.device)
            logits = penalise(
                logits, seen, said, options.repetition_penalty, options.presence_penalty,
                options.frequency_penalty,
            )  # fmt: skip
        if allowed is not None:
            logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
            if logits.max() == -torch.inf:
                raise ValueError("constraint: the model never says what may come next")
        if options.temperature == 0:
            return int(logits.argmax())
        warmth = min(max(options.temperature, COLDEST), HOTTEST)
        logits = keep_top_k((logits / warmth)[None], options.top_k)
        logits = keep_min_p(keep_top_p(logits, options.top_p), options.min_p)[0]
        return draw(logits, float(torch.rand((), dtype=torch.float64, generator=self.generator)))


def draw(logits: Float[Tensor, " vocab"], share: float) -> int:
    """The token at which the probabilities, added up in order, first exceed a share of their sum.

    Args:
        share: uniform in [0, 1).
    """
    sums = logits.softmax(-1).double().cumsum(-1)
    ends = torch.stack([share * sums[-1], sums[-1]])
    # The second is the last possible token, should the first have been rounded up to the end.
    place = torch.searchsorted(sums, ends[:1], right=True), torch.searchsorted(sums, ends[1:])
    return min(int(place[0]), int(place[1]))


def penalise(
    logits: Float[Tensor, " vocab"],
    seen: Bool[Tensor, " vocab"],
    said: Float[Tensor, " vocab"],
    repetition: float,
    presence: float,
    frequency: float = 0.0,
) -> Float[Tensor, " vocab"]:
    """Less for tokens that were seen, by a factor, and for those that were said, by a difference.

    Args:
        said: how often each was.
        presence: taken off if it was said at all.
        frequency: taken off as often as it was said.

    Source: arXiv 1909.05858, section 4.1, as transformers has it for negative logits; OpenAI's
    API reference.
    """
    lower = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(seen, lower, logits) - presence * (said > 0) - frequency * said


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


def keep_min_p(logits: Float[Tensor, "batch vocab"], min_p: float) -> Float[Tensor, "batch vocab"]:
    """-inf for tokens less probable than `min_p` times the most probable one (arXiv 2407.01082)."""
    if min_p == 0:
        return logits
    probability = logits.softmax(dim=-1)
    return logits.masked_fill(
        probability < min_p * probability.max(dim=-1, keepdim=True).values, -torch.inf
    )
