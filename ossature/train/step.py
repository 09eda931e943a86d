"""One optimizer step: micro-batches -> summed gradients -> clip -> AdamW.

The loss of a step is the sum of the cross-entropy over all counted tokens of the global batch,
divided by their number.  That number is known, and added over the ranks, before the first
backward, so the split into micro-batches and ranks changes nothing but the order of additions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import RouterConfig
from ossature.data.loader import Batch
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import reduce_gradients_now
from ossature.parallel.mesh import data_rank, sum_over_data
from ossature.train.loss import router_loss, shift


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
    both = sum_over_data(torch.tensor([tokens, int(stop)]), mesh)  # on the CPU: no device sync
    return Counted(int(both[0]), bool(both[1]))


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
) -> Sums:
    """Gradients of the step into `.grad`, times `loss_scale`; what was measured on the way.

    Router losses are averaged over the micro-batches of all ranks.
    """
    device = model.lm_head.weight.device
    layers = model.config.num_hidden_layers if log_router else 0
    experts = model.config.num_local_experts
    losses = torch.zeros(2, device=device)
    routed = torch.zeros(layers, experts + 2, device=device)  # counts, entropy, tokens
    share = 1 / (len(batches) * data_rank(mesh)[1])
    for n, batch in enumerate(batches):
        reduce_gradients_now(model, n == len(batches) - 1)
        log = RouterLog() if log_router else None
        total = model(
            batch.tokens.to(device, non_blocking=True),
            position=batch.position.to(device, non_blocking=True),
            document=batch.document.to(device, non_blocking=True),
            targets=targets(batch).to(device, non_blocking=True),
            router_log=log,
        )
        loss = total / max(1, counted)
        losses[0] += loss.detach()
        if log is not None:
            extra = share * router_loss(
                log,
                aux_loss=router.aux_loss,
                z_loss=router.z_loss,
                num_experts_per_tok=model.config.num_experts_per_tok,
            )
            if router.aux_loss or router.z_loss:
                loss = loss + extra
                losses[1] += extra.detach()
            for layer, statistics in enumerate(log.layers):
                routed[layer, :experts] += statistics.counts
                routed[layer, experts] += statistics.entropy
                routed[layer, experts + 1] += statistics.tokens
        (loss * loss_scale if loss_scale != 1.0 else loss).backward()
    packed = sum_over_data(torch.cat([losses, routed.flatten()]), mesh)
    losses, routed = packed[:2], packed[2:].unflatten(0, (layers, experts + 2))
    entropy = routed[:, experts] / routed[:, experts + 1].clamp(min=1)
    return Sums(losses[0], losses[1], routed[:, :experts], entropy)


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
