"""Sequence parallelism: what goes from block to block, divided along the sequence over tp.

Norms, router and residuals then work on a rank's own tokens.  Where heads or rows of the
vocabulary are divided instead, the sequence is whole, and it changes hands on the way in and out.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ossature.parallel.collectives import Group, gather, own_part, reduce_scatter, sum_ranks


class Sequence:
    """How (batch, seq, ...) lies on the ranks of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.divided = True
        """False while sampling: steps of one token cannot be divided, and all ranks have all."""

    def whole(self, x: Tensor) -> Tensor:
        """A rank's part of the sequence -> all of it."""
        return gather(x, 1, self.group) if self.divided else x

    def part(self, x: Tensor) -> Tensor:
        """One term of a sum over the ranks, on the whole sequence -> the sum, on a rank's part."""
        return reduce_scatter(x, 1, self.group) if self.divided else sum_ranks(x, self.group)

    def own(self, x: Tensor) -> Tensor:
        """Of something that all ranks know, what belongs to this rank's part."""
        return own_part(x, 1, self.group) if self.divided else x

    def watch(self, model: nn.Module) -> None:
        """Follow what the model is called for."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, always_call=True)

    def _before(self, _model: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        self.divided = kwargs.get("cache") is None
        ranks, (tokens,) = dist.get_world_size(self.group), args
        if self.divided and tokens.shape[1] % ranks:
            raise ValueError(
                f"parallel.tp ({ranks}) must divide the row length ({tokens.shape[1]})"
            )

    def _after(self, *_: Any) -> None:
        self.divided = True
