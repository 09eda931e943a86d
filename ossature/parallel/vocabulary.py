"""Embedding and head with the vocabulary divided over the ranks of tp, and the loss with them.

A rank has the rows of some tokens.  It embeds those and adds zeros for the others; of the logits
it finds those of its own tokens.  The softmax needs the others' too, but only their maximum and
their sum: two numbers a token cross the ranks in place of a vocabulary of logits.

Vocabularies need not divide evenly: parts are those of `torch.chunk`, the last ones smaller.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ossature.kernels.cross_entropy import (
    default_chunk_tokens,
    loss_and_gradient,
)
from ossature.model.transformer import Embedding, Head
from ossature.parallel.collectives import Group, gather_same
from ossature.parallel.sequence import Sequence


def split_embedding(embedding: Embedding, sequence: Sequence) -> None:
    """Make an embedding whose weight is split by rows return this rank's part of the sequence."""
    first = _part_size(embedding, sequence.group) * dist.get_rank(sequence.group)
    plain = embedding.forward

    def forward(tokens: Tensor) -> Tensor:
        row = tokens - first
        others = (row < 0) | (row >= len(embedding.weight))
        x = plain(row.masked_fill(others, 0))
        return sequence.part(x.masked_fill(others[..., None], 0))

    embedding.forward = forward


def split_head(head: Head, sequence: Sequence, loss_parallel: bool) -> None:
    """Make a head whose weight is split by rows return whole logits, or the loss of whole rows.

    All ranks find the same.

    Args:
        loss_parallel: false gathers the logits of a chunk of tokens for its loss.
    """
    group = sequence.group
    vocab, size = head.weight.shape[0], _part_size(head, group)
    first = size * dist.get_rank(group)

    def forward(x: Tensor, targets: Tensor | None) -> Tensor:
        x = sequence.whole(x)
        if targets is None:
            logits = head.logits(x)
            logits = F.pad(logits, (0, size - logits.shape[-1]))
            return gather_same(logits, -1, group)[..., :vocab]
        return head.loss(
            x,
            targets,
            default_chunk_tokens(x.device.type, size if loss_parallel else vocab),
            partial(
                parallel_loss if loss_parallel else gathered_loss,
                group=group,
                first=first,
                vocab=vocab,
            ),
        )

    head.forward = forward


def parallel_loss(
    logits: Tensor, targets: Tensor, wide: torch.dtype, *, group: Group, first: int, vocab: int
) -> Tensor:
    """`loss_and_gradient` of logits of the tokens from `first` on; the same on every rank."""
    counted = targets != -100
    row = targets - first
    mine = counted & (row >= 0) & (row < logits.shape[1])
    row = row.masked_fill(~mine, 0)[:, None]
    out = logits.to(wide)
    largest = _largest(out)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    out.sub_(largest[:, None])
    sums = out.new_zeros(2, len(out))  # of the exponentials; the target's logit
    if out.shape[1]:
        sums[1] = out.gather(1, row)[:, 0].masked_fill(~mine, 0)
    sums[0] = out.exp_().sum(1)
    dist.all_reduce(sums, group=group)
    loss = (sums[0].log() - sums[1]).masked_fill(~counted, 0).sum()
    out /= sums[0, :, None]
    if out.shape[1]:
        out.scatter_add_(1, row, -mine.to(out.dtype)[:, None])
    out.mul_(counted[:, None])
    if out is not logits:
        logits.copy_(out)
    return loss


def gathered_loss(
    logits: Tensor, targets: Tensor, wide: torch.dtype, *, group: Group, first: int, vocab: int
) -> Tensor:
    """The same by way of all logits, on every rank."""
    size = -(-vocab // dist.get_world_size(group))
    whole = gather_same(F.pad(logits, (0, size - logits.shape[1])), 1, group)[:, :vocab]
    whole = whole.contiguous()
    loss = loss_and_gradient(whole, targets, wide)
    logits.copy_(whole[:, first : first + logits.shape[1]])
    return loss


def _largest(x: Tensor) -> Tensor:
    return x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)


def _part_size(module: nn.Module, group: Group) -> int:
    """Rows of the vocabulary that a rank has; the last ranks may have fewer."""
    return -(-module.get_parameter("weight").shape[0] // dist.get_world_size(group))
