"""Prompts -> tokens: one pass over the prompts, then one token a row and step, with a cache.

The model is only ever called: no parameter is touched outside of its forward, so that a model
whose weights are sharded samples too, provided that every rank makes the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ossature.model.cache import Cache
from ossature.sample.sampling import check_sampling, choose

Watch = Callable[[list[int | None]], Collection[int] | None]
"""Called after each step with every row's new token, None once the row has stopped; may return
numbers of rows that stop here."""


@torch.no_grad()
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
    watch: Watch | None = None,
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
        seed: of the draws; None draws from torch's global generator.
        top_k: tokens that stay possible at each draw; 0 keeps all.
        top_p: probability that the tokens that stay possible reach together; 1 keeps all.
        watch: sees the tokens as they come, and may end rows.
        device: that computes; default: where the weights are.

    Raises:
        ValueError: an empty prompt, a token that is not in the vocabulary, or a number out of
            its range.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be 0 or more")
    device = device or next(model.parameters()).device
    tokens, document = batch_of(prompt_tokens, pad_id)
    tokens, document = tokens.to(device), document.to(device)
    _check_tokens(tokens[document >= 0], model.config.vocab_size)  # type: ignore[arg-type]
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
    cache = Cache(model.config, room=tokens.shape[1] + max_new_tokens)  # type: ignore[arg-type]
    stopped = torch.zeros(tokens.shape[0], dtype=torch.bool, device=device)
    rows, fed = [tokens], tokens

    # Compiled blocks would be compiled anew for every length.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for _ in range(max_new_tokens):
            logits = model(fed, document=document, cache=cache)[:, -1]
            chosen = choose(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            new = chosen.masked_fill(stopped, pad_id)
            rows.append(new[:, None])
            running = ~stopped
            stopped |= torch.isin(chosen, stops)
            if watch is not None:
                pairs = zip(new.tolist(), running.tolist(), strict=True)
                stopped[list(watch([token if runs else None for token, runs in pairs]) or ())] = (
                    True
                )
            if (stop_ids or watch) and stopped.all():
                break
            # A stopped row goes on unseen: `pad_id` need not be a token of the model.
            fed, document = chosen[:, None], None
    return torch.cat(rows, dim=1)


def batch_of(
    prompts: Int[Tensor, "batch seq"] | Sequence[Sequence[int]], pad_id: int = 0
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Rows of one length, padded in front, and their documents: 0, and -1 for padding."""
    if isinstance(prompts, Tensor):
        if not prompts.shape[1]:
            raise ValueError("prompt_tokens: an empty prompt; give at least one token")
        return prompts, torch.zeros_like(prompts)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt_tokens: prompt {row} is empty; give at least one token")
    if not prompts:
        raise ValueError("prompt_tokens: no prompt")
    longest = max(len(prompt) for prompt in prompts)
    missing = [longest - len(prompt) for prompt in prompts]
    rows = [[pad_id] * pads + list(row) for pads, row in zip(missing, prompts, strict=True)]
    document = [[-1] * pads + [0] * (longest - pads) for pads in missing]
    return torch.tensor(rows), torch.tensor(document)


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


def _check_tokens(tokens: Int[Tensor, " tokens"], vocab_size: int) -> None:
    if tokens.numel() and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0].item()
        raise ValueError(
            f"prompt_tokens: token {wrong} is not in the model's vocabulary of {vocab_size}; "
            "is this the model's tokenizer?"
        )
