"""Expert parallelism: experts divided over the ranks of `ep`, and each over those of `etp`.

With ep, a rank has some of the experts, and the tokens come to it: each goes to the ranks of the
experts it chose and comes back weighted.  With etp, a rank has a slice of the inner dim of its
experts: the tokens of the ranks of etp are put together, every rank finds one term of a sum for
all of them, and each gets the sum for its own; the down bias is in the first rank's term alone.

The experts' own forward does not change: it is called with fewer or thinner experts, on rows that
have chosen one expert each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ossature.kernels import experts as kernels
from ossature.model.frozen_experts import FrozenExperts
from ossature.model.moe import Experts
from ossature.model.transformer import Transformer
from ossature.parallel.collectives import Group, all_to_all, gather, reduce_scatter, sum_ranks
from ossature.parallel.local import Use, added_once, compute_locally, split, summed

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, chosen, weights) -> the weighted sum of each token's experts."""

SPLITS = {
    "gate_up_weight": {"ep": 0, "etp": 1},  # rows alternate gate, up: a slice has whole pairs
    "gate_up_bias": {"ep": 0, "etp": 1},
    "gate_up_blocks": {"ep": 0, "etp": 1},
    "gate_up_scales": {"ep": 0, "etp": 2},
    "gate_up_lora_a": {"ep": 0, "etp": None},
    "gate_up_lora_b": {"ep": 0, "etp": 1},
    "gate_up_lora_magnitude": {"ep": 0, "etp": 1},
    "down_weight": {"ep": 0, "etp": 2},
    "down_bias": {"ep": 0, "etp": None},
    "down_blocks": {"ep": 0, "etp": 2},
    "down_scales": {"ep": 0, "etp": 1},
    "down_lora_a": {"ep": 0, "etp": 2},
    "down_lora_b": {"ep": 0, "etp": None},
    "down_lora_magnitude": {"ep": 0, "etp": None},
}
"""The dim of each parameter that an axis splits."""

SUMMED = ("gate_up_lora_a", "down_lora_b", "down_lora_magnitude")
"""What ranks of etp all have whole, and of whose gradients they find terms."""


def split_experts(model: Transformer, view: DeviceMesh) -> None:
    """Divide the experts of every block over ep and etp, in place.

    Args:
        view: of the experts, by `mesh.expert_view`.
    """
    axes = [axis for axis in ("ep", "etp") if view[axis].size() > 1]
    if not axes:
        return
    for block in model.blocks.values():
        experts = block.get_submodule("moe.experts")
        assert isinstance(experts, Experts)
        number = experts.gate_up_bias.shape[0]
        names = [name for name, _ in experts.named_parameters()]
        split(experts, view[tuple(axes)], **{n: tuple(SPLITS[n][a] for a in axes) for n in names})
        uses: dict[str, Use] = {}
        if "etp" in axes:
            group = view.get_group("etp")
            uses = dict.fromkeys(SUMMED, summed(group)) | {"down_bias": added_once(group)}
            if isinstance(experts, FrozenExperts):
                experts.add_squares["down"] = partial(sum_ranks, group=group)
        compute_locally(experts, **uses)
        forward: Forward = experts.forward
        if "ep" in axes:
            forward = partial(_sent, AllToAll(view.get_group("ep"), number), forward)
        if "etp" in axes:
            forward = partial(_put_together, view.get_group("etp"), forward)
        experts.forward = forward


class Sent(NamedTuple):
    """Rows that came to this rank, in the order of the ranks they came from; and the way back."""

    rows: Tensor
    """(rows, hidden)."""
    expert: Tensor
    """(rows,) which of this rank's experts each is for."""
    weights: Tensor
    """(rows,) routing weights."""
    order: Tensor
    """Of the rows this rank has sent; see `sort_by_expert`."""
    k: int
    to_ranks: list[int]
    """Rows sent to each rank."""
    from_ranks: list[int]
    """Rows that came from each rank."""


class AllToAll:
    """Tokens to the ranks of their experts and back, by all-to-alls of as many rows as there are.

    What another dispatcher has to offer is `dispatch` and `combine`; DeepEP's two calls of those
    names fit.  The host waits for the device once, in `dispatch`: an all-to-all takes its sizes
    from there.
    """

    def __init__(self, group: Group, num_experts: int) -> None:
        self.group = group
        self.num_experts = num_experts
        """Of all ranks; rank r has the r-th run of them."""

    def dispatch(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Sent:
        """Send each token to its experts: one row a choice.

        Args:
            x: (tokens, hidden); chosen, weights: (tokens, k).
        """
        ranks, k = dist.get_world_size(self.group), chosen.shape[1]
        order, counts = kernels.sort_by_expert(chosen, self.num_experts)
        coming = torch.empty_like(counts)  # from each rank, for each of this rank's experts
        dist.all_to_all_single(coming, counts, group=self.group)
        both = torch.stack([counts, coming]).unflatten(1, (ranks, -1))
        to_ranks, from_ranks = both.sum(-1).tolist()
        rows = all_to_all(kernels.dispatch(x, order, k), from_ranks, to_ranks, self.group)
        number = torch.arange(self.num_experts // ranks, device=x.device).repeat(ranks)
        return Sent(
            rows=rows,
            expert=number.repeat_interleave(coming, output_size=len(rows)),
            weights=all_to_all(weights.flatten()[order], from_ranks, to_ranks, self.group),
            order=order,
            k=k,
            to_ranks=to_ranks,
            from_ranks=from_ranks,
        )

    def combine(self, rows: Tensor, sent: Sent) -> Tensor:
        """Send each row back to where it came from, and add up those of a token."""
        back = all_to_all(rows, sent.to_ranks, sent.from_ranks, self.group)
        return kernels.combine(back, sent.order, sent.k)


def _sent(
    dispatcher: AllToAll, experts: Forward, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    sent = dispatcher.dispatch(x, chosen, weights)
    return dispatcher.combine(experts(sent.rows, sent.expert[:, None], sent.weights[:, None]), sent)


def _put_together(
    group: Group, experts: Forward, x: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    parts = x, chosen, weights
    tokens = len(x)
    if not torch.is_grad_enabled():  # ranks train on as many tokens; what they evaluate may differ
        most = torch.tensor(tokens, device=x.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        parts = tuple(F.pad(part, (0, 0, 0, int(most) - tokens)) for part in parts)
    whole = (gather(part, 0, group) for part in parts)
    return reduce_scatter(experts(*whole), 0, group)[:tokens]
