"""What FSDP takes and gives back around the blocks of a step: gathered weights, reduced gradients.

Followed from torch/distributed/fsdp/_fully_shard of torch 2.13.  One rank alone does without: see
`ossature.parallel.masters`.
"""

from __future__ import annotations

from ossature.config import ParallelConfig
from ossature.parallel.shards import Group, Stage
from ossature.parallel.sizes import BRIEF, GRADIENTS, Bytes, Ledger

SHARDS, GATHERED, BUFFERS = "gradients", "weights, gathered", "buffers of collectives"


class Sharding:
    """FSDP of one rank."""

    def __init__(self, ledger: Ledger, axes: ParallelConfig, on_host: bool) -> None:
        self.m, self.axes = ledger, axes
        self.on_host = on_host
        """Weights, gradients and the optimizer are in other memory."""
        self.stepped: Bytes = 0.0
        """Bytes of a number while `LeanAdamW` steps it, by blocks of 4 Mi numbers."""

    def gather(self, stage: Stage, group: Group, forward: bool = False) -> None:
        m = self.m
        if group.is_whole:
            return
        group.is_whole = True
        if group.ranks == 1:
            m.take(GATHERED, group.whole)
            m.pass_by(BUFFERS, group.largest_cast)
            return
        if not group.coming:
            self.fetch(group)
        group.coming = False
        if forward:
            m.give(BUFFERS, stage.held_output)
            stage.held_output = 0.0
        m.take(GATHERED, group.whole)
        m.pass_by(BUFFERS, group.inside)
        if forward:
            stage.held_output = group.whole
        else:
            m.give(BUFFERS, group.whole)

    def fetch(self, group: Group) -> None:
        self.m.pass_by(BUFFERS, group.sent + (group.weights if self.on_host else 0))
        self.m.take(BUFFERS, group.whole)

    def ask(self, stage: Stage, number: int, block: int | None = None) -> None:
        """Gather ahead what the backward pass needs after group `number`.

        Args:
            block: whose weights those are; the number of blocks for the root's.
        """
        ahead = self.axes.prefetch_blocks
        if ahead and block is not None:
            own = block if block < len(stage.layers) else None
            self.ask_blocks(stage, range(block - 1, max(block - 1 - ahead, -1), -1), own)
        if number and not (ahead and block is not None):
            self.fetch_ahead(stage.groups[number - 1])

    def ask_blocks(self, stage: Stage, blocks: range, own: int | None = None) -> None:
        """Gather blocks ahead; before them the experts of block `own`."""
        if not self.axes.prefetch_blocks:
            return
        for group in [
            *([stage.experts[own]] if own is not None else []),
            *(group for n in blocks for group in (stage.blocks[n], stage.experts[n])),
        ]:
            if group is not None:
                self.fetch_ahead(group)

    def fetch_ahead(self, group: Group) -> None:
        if not group.is_whole and not group.coming and group.ranks > 1:
            self.fetch(group)
            group.coming = True

    def drop(self, group: Group) -> None:
        if group.is_whole:
            self.m.give(GATHERED, group.whole)
            group.is_whole = False

    def after(self, stage: Stage, group: Group, reduces: bool) -> None:
        """A group's gradients are found."""
        if self.axes.pp > 1:
            self.add_up(group)
            return
        if group.dropped:
            self.drop(group)
        if reduces or self.axes.reduce_every_micro_batch:
            self.reduce(stage, group)
        else:
            self.add_up(group)

    def add_up(self, group: Group) -> None:
        """Keep them for the micro-batches to come, in the dtype of their reduction."""
        if not group.summed:
            self.m.take(GRADIENTS, group.gradients_summed - group.gradients)
        else:
            self.m.give(GRADIENTS, group.gradients)
        group.summed = True

    def reduce(self, stage: Stage, group: Group) -> None:
        m = self.m
        m.give(BUFFERS, stage.reducing)
        m.pass_by(BUFFERS, group.largest_inside)
        stage.reducing = group.reduced * group.ranks
        m.take(BUFFERS, stage.reducing)
        held = group.gradients
        if group.summed:
            m.give(GRADIENTS, group.gradients_summed)
        else:
            m.give(GRADIENTS, held)
        group.summed = False
        m.take(SHARDS, group.reduced)
        if group.shards != group.reduced:
            m.take(SHARDS, group.shards)
            m.give(SHARDS, group.reduced)
        if group.has_shards or self.on_host:  # added up, or moved
            m.give(SHARDS, group.shards)
        group.has_shards = True

    def reduce_all(self, stage: Stage) -> None:
        for group in stage.groups[::-1]:
            self.drop(group)
            self.reduce(stage, group)
        self.m.give(BUFFERS, stage.reducing)
        stage.reducing = 0.0


class Masters(Sharding):
    """One rank alone: copies of what is kept in another dtype, there from the first step on."""

    def gather(self, stage: Stage, group: Group, forward: bool = False) -> None:
        if group.is_whole:
            return
        for each in stage.groups:
            each.is_whole = True
            self.m.take(GATHERED, each.sent)

    def drop(self, group: Group) -> None:
        pass

    def after(self, stage: Stage, group: Group, reduces: bool) -> None:
        self.m.give(GRADIENTS, group.gradients)
        if not group.has_shards:
            self.m.take(SHARDS, group.shards)
        group.has_shards = True


class InBackward(Sharding):
    """One rank alone, whose weights are computed with as they are, and stepped in the backward."""

    def gather(self, stage: Stage, group: Group, forward: bool = False) -> None:
        pass

    def after(self, stage: Stage, group: Group, reduces: bool) -> None:
        self.step(group, group.gradients - group.stepped)
        group.stepped = 0.0

    def step(self, group: Group, gradients: Bytes) -> None:
        self.m.pass_by(BRIEF, self.stepped * min(2**22, group.largest_shard))
        self.m.give(GRADIENTS, gradients)
        group.stepped += gradients
