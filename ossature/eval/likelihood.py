"""Contexts and continuations -> how probable the model finds each continuation.

A row is one context with its continuation.  The head finds logits of the places that are asked
for, some at a time, and keeps of them two numbers a row: so a row may be as long as its
activations allow.  The model is only ever called, and so it may be divided over ranks in any way;
ranks that read different rows share them out.

Nothing here samples: a text that greedy decoding would give is one whose every token is the most
probable one.  tests/eval/test_likelihood.py holds all this to whole logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from ossature.model.transformer import Transformer

LOGITS = 2**25
"""Logits that exist at a time."""


class Row(NamedTuple):
    context: Sequence[int]
    """Tokens; at least one."""
    continuation: Sequence[int]
    """Tokens; at least one."""


class Score(NamedTuple):
    logprob: float
    """Of the continuation after the context: a sum, nats."""
    missed: int
    """Its tokens that are not the most probable ones at their places."""


class Place(NamedTuple):
    """Where a rank stands among those that have the model together."""

    rank: int = 0
    """Among those that read different rows."""
    world: int = 1
    """Of those."""
    speaks: bool = True
    """Whether this rank's scores count: ranks of tp find the same ones."""
    multiple: int = 1
    """Tokens of a row, padding included, are a multiple of it."""


def batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """Numbers of rows, the longest first, in batches of at most `batch_tokens` with padding.

    A row that is longer is a batch of its own.
    """
    order = sorted(range(len(rows)), key=lambda n: (-_length(rows[n]), n))
    made: list[list[int]] = []
    for n in order:
        if made and (len(made[-1]) + 1) * _length(rows[made[-1][0]]) <= batch_tokens:
            made[-1].append(n)
        else:
            made.append([n])
    return made


def score(
    model: Transformer,
    rows: Sequence[Row],
    place: Place,
    device: torch.device,
    *,
    batch_tokens: int = 8192,
) -> Iterator[dict[int, Score]]:
    """The scores of all rows by number, some at a time; every rank gets all of them.

    All ranks make the same call, of a model in evaluation mode, and read it to its end.
    """
    turns = batches(rows, batch_tokens)
    for first in range(0, len(turns), place.world):
        turn = turns[first : first + place.world]
        mine = place.rank < len(turn)
        # Weights may be gathered by all ranks together: one without a batch repeats another's.
        batch = turn[place.rank if mine else 0]
        found = _run(model, [rows[n] for n in batch], place.multiple, device)
        # Ranks of tp find the same, those of cp parts of it, those of pp nothing but for the last.
        numbers = torch.zeros(2, len(turn), max(map(len, turn)), dtype=torch.float64)
        if mine and place.speaks and found is not None:
            numbers[:, place.rank, : len(batch)] = found
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(numbers)
        yield {
            n: Score(float(numbers[0, i, j]), round(float(numbers[1, i, j])))
            for i, batch in enumerate(turn)
            for j, n in enumerate(batch)
        }


@torch.no_grad()
def _run(
    model: Transformer, rows: list[Row], multiple: int, device: torch.device
) -> Float[Tensor, "2 batch"] | None:
    """Log-probability and missed tokens of each row, as far as this rank's head finds them."""
    longest = -(-_length(rows[0]) // multiple) * multiple
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    document = torch.full_like(tokens, -1)
    for n, row in enumerate(rows):
        whole = torch.tensor([*row.context, *row.continuation])
        size = len(whole) - 1
        tokens[n, :size], document[n, :size] = whole[:-1], 0
        targets[n, len(row.context) - 1 : size] = whole[len(row.context) :]
    position = torch.arange(longest).expand_as(tokens)
    with _scoring(model) as sums, torch.compiler.set_stance("force_eager"):
        model(
            tokens.to(device),
            position=position.to(device),
            document=document.to(device),
            targets=targets.to(device),
        )
    return sums[0] if sums else None


@contextmanager
def _scoring(model: Transformer) -> Iterator[list[Tensor]]:
    """For a while the head finds scores of rows in place of their loss, and puts them in the list.

    The list stays empty on a rank of pp that has no head.
    """
    head: nn.Module | None = model.lm_head
    sums: list[Tensor] = []
    if head is None:
        yield sums
        return
    before = head.__dict__.get("forward")
    logits_of = head.forward

    def forward(x: Tensor, targets: Tensor) -> Tensor:
        sums.append(_row_sums(logits_of, x, targets))
        return torch.zeros((), device=x.device)  # in place of the loss

    head.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield sums
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _row_sums(
    logits_of, x: Float[Tensor, "batch part hidden"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "2 batch"]:
    """Of each row, the sum of its targets' log-probabilities, and how many are not the largest.

    Args:
        logits_of: (x, None) -> logits; under tp `x` is a rank's part of the row, and what it
            returns is of all parts.
    """
    goal = targets.unflatten(1, (-1, x.shape[1]))  # (batch, parts, part)
    asked = (goal >= 0).any(dim=0).any(dim=0).nonzero().flatten()
    sums = torch.zeros(2, len(x), dtype=torch.float64)
    size = None
    while len(asked):
        # The first logits say how large the vocabulary is.
        now = asked[: 1 if size is None else size]
        asked = asked[len(now) :]
        logits = logits_of(x[:, now], None)
        if size is None:
            size = max(1, LOGITS // logits[:, 0].numel() // goal.shape[1])
        here = goal[:, :, now].flatten(1)
        counted = here >= 0
        # Logits that nobody asks for are left out before they are widened.
        logits, here = logits[counted], here[counted][:, None]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_probability = wide.log_softmax(-1)
        found = log_probability.gather(1, here)[:, 0]
        missed = ~(found >= log_probability.amax(1))  # what is no number is missed too
        row = counted.nonzero()[:, 0].cpu()
        sums[0].index_add_(0, row, found.double().cpu())
        sums[1].index_add_(0, row, missed.double().cpu())
    return sums


def _length(row: Row) -> int:
    return len(row.context) + len(row.continuation) - 1
