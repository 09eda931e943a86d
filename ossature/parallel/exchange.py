"""Keys and values between the ranks that share a sequence: all of them, or a halo.

A row of `seq` tokens is cut into 2 x ranks chunks, and rank r holds chunks r and 2 x ranks - 1 - r,
the head and the tail: causal attention to a later chunk costs more, and so every rank has the same
work.  A full layer needs the keys of the whole row.  A sliding layer needs, for each chunk, only
the window - 1 tokens before it; where chunks are shorter than that they come from several ranks.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ossature.parallel.collectives import Group, all_to_all, gather


class Split(NamedTuple):
    """How rows are cut, seen from one rank."""

    rank: int
    ranks: int
    seq: int
    """Tokens of a whole row."""

    @property
    def length(self) -> int:
        """Tokens of a chunk."""
        return self.seq // (2 * self.ranks)

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of this rank's chunks."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    @property
    def places(self) -> Tensor:
        """Places in the row of this rank's tokens, in the order in which it holds them."""
        starts = torch.tensor(self.chunks) * self.length
        return (starts[:, None] + torch.arange(self.length)).flatten()

    def cut(self, x: Tensor) -> Tensor:
        """This rank's part of (batch, seq, ...)."""
        chunks = x.split(self.length, dim=1)
        return torch.cat([chunks[number] for number in self.chunks], dim=1)


def gather_row(x: Tensor, split: Split, group: Group) -> Tensor:
    """The whole row of every rank's (batch, 2 * length, ...), in order: (batch, seq, ...)."""
    pairs = gather(x, 1, group).split(split.length, dim=1)  # head and tail of each rank
    return torch.cat([*pairs[0::2], *reversed(pairs[1::2])], dim=1)


class Halo(NamedTuple):
    """Indices of one rank's exchange, made by `halo`."""

    sent: Tensor
    """Own tokens that others need, by rank."""
    sent_tokens: list[int]
    """How many of them go to each rank."""
    received_tokens: list[int]
    """How many come from each rank."""
    arranged: Tensor
    """For each of the two chunks, its halo and then itself: indices into own tokens, received
    tokens, and one filler after them that stands for tokens before the row."""
    places: Tensor
    """Places in the row of the arranged tokens; negative for the filler."""


@functools.cache
def halo(split: Split, reach: int) -> Halo:
    """What to send and receive so that each chunk has the `reach` tokens before it."""
    others = [split._replace(rank=rank) for rank in range(split.ranks)]
    sent = [_needed(other, reach)[split.rank] for other in others]
    received = _needed(split, reach)
    own = 2 * split.length
    # A token is received once a chunk that needs it: at most twice, in the order of `_needed`.
    number = own
    index: dict[tuple[int, int], int] = {}  # (chunk, place) -> index
    for needed in received:
        for chunk, place in needed:
            index[chunk, place] = number
            number += 1
    arranged, places = [], []
    for slot, chunk in enumerate(split.chunks):
        first = chunk * split.length
        places += range(first - reach, first + split.length)
        arranged += [index.get((chunk, place), number) for place in range(first - reach, first)]
        arranged += range(slot * split.length, (slot + 1) * split.length)
    return Halo(
        sent=torch.tensor([_index(split, place) for needed in sent for _, place in needed]).long(),
        sent_tokens=[len(needed) for needed in sent],
        received_tokens=[len(needed) for needed in received],
        arranged=torch.tensor(arranged),
        places=torch.tensor(places),
    )


def exchange(x: Tensor, indices: Halo, group: Group) -> Tensor:
    """(batch, 2 * length, ...) -> each chunk after its halo: (batch, 2 * (reach + length), ...)."""
    sent = x.index_select(1, indices.sent.to(x.device)).transpose(0, 1)
    received = all_to_all(sent, indices.received_tokens, indices.sent_tokens, group)
    filler = torch.zeros_like(x[:, :1])
    return torch.cat([x, received.transpose(0, 1), filler], dim=1).index_select(
        1, indices.arranged.to(x.device)
    )


def _needed(split: Split, reach: int) -> list[list[tuple[int, int]]]:
    """For each rank that holds them, the (chunk, place) this rank needs before its chunks."""
    needed: list[list[tuple[int, int]]] = [[] for _ in range(split.ranks)]
    for chunk in split.chunks:
        first = chunk * split.length
        for place in range(max(0, first - reach), first):
            there = place // split.length
            needed[min(there, 2 * split.ranks - 1 - there)].append((chunk, place))
    return needed


def _index(split: Split, place: int) -> int:
    """Where this rank, which holds the token, has it."""
    return split.chunks.index(place // split.length) * split.length + place % split.length
