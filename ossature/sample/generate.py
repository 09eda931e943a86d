"""Prompts -> tokens, all at once: the plain call on top of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request


def generate(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "batch seq"] | Sequence[Sequence[int]],
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    seed: int | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    device: torch.device | None = None,
) -> Int[Tensor, "batch longer"]:
    """The prompts and what the model says next: (batch, seq + new).

    Without stop ids exactly `max_new_tokens` are added, else as many as the last row to stop
    takes.  A row keeps the stop id it ended with and is filled with `pad_id` after it.

    Args:
        prompt_tokens: as a tensor, whole rows; as lists, prompts of any lengths, which are padded
            in front with `pad_id` and see nothing of the padding.
        temperature: 0 takes the most probable token.
        stop_ids: a row ends with the first of these ids it produces.
        seed: of the draws, row n's are seeded with seed + n; None takes torch's next number.
        top_k: tokens that stay possible at each draw; 0 keeps all.
        top_p: probability that the tokens that stay possible reach together; 1 keeps all.
        device: that computes; default: where the weights are.

    Raises:
        ValueError: an empty prompt, a token that is not in the vocabulary, or a number out of
            its range.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be 0 or more")
    prompts = _lists(prompt_tokens)
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    options = SamplingOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max(1, max_new_tokens),
        stop_ids=tuple(stop_ids),
    )
    requests = [
        Request(prompt, replace(options, seed=seed + row)) for row, prompt in enumerate(prompts)
    ]
    longest = max(map(len, prompts))
    with evaluating(model):
        engine = Engine(
            model,
            max_batch=len(prompts),
            max_tokens=len(prompts) * (longest + max_new_tokens),
            device=device,
        )
        said = [[] for _ in prompts]
        if max_new_tokens:
            said = [text.tokens for (text,) in engine.generate(requests)]
    most = max(map(len, said))
    rows = [
        [pad_id] * (longest - len(prompt)) + prompt + new + [pad_id] * (most - len(new))
        for prompt, new in zip(prompts, said, strict=True)
    ]
    return torch.tensor(rows, device=engine.device)


def _lists(prompts: Int[Tensor, "batch seq"] | Sequence[Sequence[int]]) -> list[list[int]]:
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(row) for row in prompts]
    if not rows:
        raise ValueError("prompt_tokens: no prompt")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt_tokens: prompt {number} is empty; give at least one token")
    return rows


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; every module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
