"""One optimizer step: micro-batches -> summed gradients -> clip -> AdamW.

The loss of a step is the sum of the cross-entropy over all counted tokens of the global batch,
divided by their number.  That number is known, and added over the ranks, before the first
backward, so the split into micro-batches and ranks changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import ParallelConfig, RouterConfig
from ossature.data.loader import Batch
from ossature.model.moe import RouterLog, RouterStatistics
from ossature.model.transformer import Transformer
from ossature.parallel.collectives import sum_ranks
from ossature.parallel.fsdp import reduce_gradients_now, release
from ossature.parallel.mesh import data_rank
from ossature.parallel.pipeline import Inputs, Loss, Pipeline
from ossature.parallel.stages import pack, unpack
from ossature.train.loss import router_loss, shift

DEFAULT = ParallelConfig()


class Counted(NamedTuple):
    """What is known of a step before it is computed, over all ranks."""

    tokens: int
    """Targets that carry loss."""
    stop: bool
    """Some rank was asked to stop."""


class Sums(NamedTuple):
    """What one step measured, over all ranks; on the device."""

    loss: Tensor
    """Mean cross-entropy of the counted tokens."""
    router_loss: Tensor
    """Router losses that were added to it, coefficients included."""
    counts: Tensor
    """(layers, experts) tokens sent to each expert; empty when not asked for."""
    entropy: Tensor
    """(layers,) mean entropy of the router, in nats; empty when not asked for."""


def count(batches: list[Batch], stop: bool, mesh: DeviceMesh) -> Counted:
    """Counted targets of the whole step, and whether any rank wants to stop; one reduction."""
    tokens = sum(int((targets(batch) >= 0).sum()) for batch in batches)
    both = torch.tensor([tokens, int(stop)])  # on the CPU: no device sync
    dist.all_reduce(both)
    # Ranks that differ only in pp, cp or tp have counted the same rows.
    same = mesh.size() // data_rank(mesh)[1]
    return Counted(int(both[0]) // same, bool(both[1]))


def targets(batch: Batch) -> Tensor:
    """The token to predict from each place of a batch."""
    return shift(batch.tokens, batch.loss_mask, batch.document)


def accumulate(
    model: Transformer,
    batches: list[Batch],
    counted: int,
    mesh: DeviceMesh,
    router: RouterConfig,
    *,
    loss_scale: float = 1.0,
    log_router: bool = True,
    pipeline: Pipeline | None = None,
    axes: ParallelConfig = DEFAULT,
) -> Sums:
    """Gradients of the step into `.grad`, times `loss_scale`; what was measured on the way.

    Router losses are averaged over the micro-batches of all ranks.

    Args:
        axes: of the run, for what it says about reductions.
    """
    device = torch.device(mesh.device_type)
    layers = model.config.num_hidden_layers if log_router else 0
    experts = model.config.num_local_experts
    losses = torch.zeros(2, device=device)
    routed = torch.zeros(layers, experts + 2, device=device)  # counts, entropy, tokens
    share = 1 / (len(batches) * data_rank(mesh)[1])

    def loss_of(total: Tensor, log: RouterLog | None) -> Tensor:
        loss = total / max(1, counted)
        losses[0] += loss.detach()
        if log is not None and (router.aux_loss or router.z_loss):
            extra = share * router_loss(
                over_the_row(log, mesh),
                aux_loss=router.aux_loss,
                z_loss=router.z_loss,
                num_experts_per_tok=model.config.num_experts_per_tok,
            )
            loss = loss + extra
            losses[1] += extra.detach()
        return loss * loss_scale if loss_scale != 1.0 else loss

    def note(layer: int, statistics: RouterStatistics) -> None:
        routed[layer, :experts] += statistics.counts
        routed[layer, experts] += statistics.entropy
        routed[layer, experts + 1] += statistics.tokens

    inputs = [
        Inputs(*(x.to(device, non_blocking=True) for x in (*batch[:3], targets(batch))))
        for batch in batches
    ]
    if pipeline is None:
        one_by_one(model, inputs, loss_of, note if log_router else None, axes)
    else:
        pipeline.step(inputs, loss_of, note if log_router else None)
    release(model)
    # Ranks of tp find the same loss, those of cp parts of it; both find the same router losses.
    cp, tp = mesh["cp"].size(), mesh["tp"].size()
    losses /= torch.tensor([tp, cp * tp], device=device)
    packed = torch.cat([losses, routed.flatten()])
    if mesh.size() > 1:
        dist.all_reduce(packed)
    losses, routed = packed[:2], packed[2:].unflatten(0, (layers, experts + 2))
    entropy = routed[:, experts] / routed[:, experts + 1].clamp(min=1)
    return Sums(losses[0], losses[1], routed[:, :experts], entropy)


def one_by_one(
    model: Transformer,
    batches: list[Inputs],
    loss_of: Loss,
    note: Callable[[int, RouterStatistics], None] | None,
    axes: ParallelConfig,
) -> None:
    """Forward and backward of one micro-batch after the other; `Pipeline.step` without stages."""
    for n, batch in enumerate(batches):
        reduce_gradients_now(model, n == len(batches) - 1, axes)
        forward_one(model, batch, loss_of, note).backward()


def forward_one(
    model: Transformer,
    batch: Inputs,
    loss_of: Loss,
    note: Callable[[int, RouterStatistics], None] | None,
) -> Tensor:
    """The loss of a micro-batch.

    It alone is returned: the log would hold what its statistics need for a backward pass, and
    with that the input of every block that is computed again, until the end of the whole.
    """
    log = None if note is None else RouterLog()
    total = model(
        batch.tokens,
        position=batch.position,
        document=batch.document,
        targets=batch.targets,
        router_log=log,
    )
    loss = loss_of(total, log)
    if log is not None and note is not None:
        for layer, statistics in enumerate(log.layers):
            note(layer, statistics)
    return loss


def over_the_row(log: RouterLog, mesh: DeviceMesh) -> RouterLog:
    """Sums over all tokens of the micro-batch, where its rows are divided over cp and tp.

    The layers become one: a router loss needs no more than their sums.
    """
    axes = [axis for axis in ("cp", "tp") if mesh[axis].size() > 1]
    if not axes:
        return log
    sums = torch.stack([pack(layer) for layer in log.layers]).sum(0)
    for axis in axes:
        sums = sum_ranks(sums, mesh.get_group(axis))
    whole = RouterLog()
    whole.layers.append(unpack(sums))
    return whole


@torch.no_grad()
def update_balance(model: Transformer, counts: Tensor, rate: float) -> None:
    """Nudge every layer's balancing bias: up for experts below the mean load, down above it.

    Args:
        counts: (layers, experts) of the whole step; padding is not in it.

    Source: arXiv 2408.15664, algorithm 1.
    """
    biases = balance_biases(model)
    for layer, load in enumerate(counts):
        if layer in biases:
            biases[layer] += rate * (load.mean() - load).sign()


@torch.no_grad()
def anneal_balance(model: Transformer, factor: float) -> None:
    """Shrink every layer's balancing bias."""
    for bias in balance_biases(model).values():
        bias *= factor


def balance_biases(model: Transformer) -> dict[int, Tensor]:
    """The balancing bias of every layer that has one; they are the model's only buffers."""
    return {int(name.split(".")[1]): bias for name, bias in model.named_buffers()}
