"""Bytes per rank of a step, before a device is asked.

The weights are those of the model on the meta device, divided by the rules that training divides
them by.  What FSDP gathers and reduces, what blocks keep and what passes by is gone through in the
order of a step, as the code does it: forward and backward of each micro-batch in the order of the
pipeline's schedule, reductions, the optimizer.  The peak is the most that is ever held.

What stages hold is followed from torch/distributed/pipelining of torch 2.13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ossature.config import TrainConfig
from ossature.model.transformer import Transformer
from ossature.parallel import activations as parts
from ossature.parallel import ends
from ossature.parallel.fsdp import alone
from ossature.parallel.gathering import BUFFERS, InBackward, Masters, Sharding
from ossature.parallel.orders import Action, actions
from ossature.parallel.pipeline import splits_backward
from ossature.parallel.shards import Group, Stage, StateBytes, Weight, divided
from ossature.parallel.sizes import (
    BRIEF,
    GRADIENTS,
    KEPT,
    LOSS,
    Bytes,
    Gradients,
    Ledger,
    Sizes,
)
from ossature.parallel.stages import stage_layers, stages_of, stages_per_rank

WEIGHTS, STATES, INPUTS = "weights", "optimizer states", "batches"
PIPELINE, WAITING = "buffers of the pipeline", "gradients, put off"


@dataclass(frozen=True)
class Use:
    """Of one rank."""

    peak: Bytes
    """Bytes."""
    at_peak: dict[str, Bytes]
    """What they are."""
    layers: tuple[int, ...]


class Walk:
    """One step of one rank of the axis pp."""

    def __init__(
        self, model: Transformer, weights: list[Weight], config: TrainConfig,
        axis_sizes: dict[str, int], device: str, rank: int,
    ) -> None:  # fmt: skip
        axes = config.parallel
        self.config, self.model = config, model
        self.m = Ledger()
        self.s = Sizes(config, model.config, device)
        count = axes.pp * stages_per_rank(axes)
        layers = stage_layers(model.config, count)
        fsdp = axis_sizes["dp_shard"] * axis_sizes["cp"]
        self.stages = {
            n: Stage(weights, layers[n], n == 0, n == count - 1, config, fsdp)
            for n in stages_of(rank, axes)
        }
        kind = Masters if alone(math.prod(axis_sizes.values()), config) else Sharding
        kind = InBackward if config.optim.in_backward else kind
        self.fsdp = kind(self.m, axes, self.on_host)
        # Gradient, moments, the new weight and its divisor in fp32; random bits, and what they are
        # added to; or shares of a group's largest number, and their 64-bit places in the table.
        rounds = "bf16" in (config.optim.weights, config.optim.states)
        self.fsdp.stepped = 4 * (5 + (5 if config.optim.states == "8bit" else 2 * rounds))
        self.rank = rank
        data_ranks = axis_sizes["dp_replicate"] * axis_sizes["dp_shard"]
        self.micro_batches = config.global_batch_tokens // (config.micro_batch_tokens * data_ranks)

    @property
    def on_host(self) -> bool:
        """Weights, gradients and the optimizer are in other memory than what is computed with."""
        return self.config.parallel.cpu_offload and self.s.cuda

    @property
    def offloads(self) -> bool:
        """So is what blocks keep."""
        return self.config.offload_activations and self.s.cuda

    @property
    def standing(self) -> Bytes:
        """Bytes of weights, gradients and the optimizer: what there is at the end of a step."""
        if self.on_host:
            return 0.0
        groups = [group for stage in self.stages.values() for group in stage.groups]
        held = sum(group.weights + group.states for group in groups)
        stepped = self.config.optim.in_backward
        return held if stepped else held + sum(group.shards for group in groups)

    def use(self) -> Use:
        """The step, gone through; once."""
        m, s, axes = self.m, self.s, self.config.parallel
        for stage in self.stages.values():
            for group in stage.groups:
                if not self.on_host:
                    m.take(WEIGHTS, group.weights)
                    m.take(STATES, group.states)
            if axes.pp > 1:
                sides = (not stage.first) + (not stage.last)
                m.take(PIPELINE, sides * self.micro_batches * s.x)
        per_token = (8 * 4 + (0 if s.cuda else 1)) * (2 if axes.pp > 1 else 1)
        m.take(INPUTS, self.micro_batches * self.config.micro_batch_tokens * per_token)
        if axes.pp > 1:
            for action in actions(axes, self.rank, self.micro_batches):
                self.act(action)
        else:
            # All micro-batches between the first and the last are alike.
            few = min(self.micro_batches, 3)
            for n in range(few):
                self.forward(self.stages[0])
                self.backward(self.stages[0], reduces=n == few - 1)
        for stage in self.stages.values():
            for group in stage.groups:
                self.fsdp.drop(group)
        self.step_optimizer()
        layers = tuple(n for stage in self.stages.values() for n in stage.layers)
        return Use(m.peak, m.at_peak, layers)

    def act(self, action: Action) -> None:
        stage = self.stages[action.stage]
        if action.kind == "F":
            self.forward(stage)
        elif action.kind == "B":
            self.backward(stage, reduces=False)
        elif action.kind == "R":
            self.fsdp.reduce_all(stage)
        elif splits_backward(self.config):
            self.half_backward(stage, action.kind)
        elif action.kind == "I":
            self.backward(stage, reduces=False)

    def step_optimizer(self) -> None:
        """`LeanAdamW` computes in fp32, a block of a weight at a time; torch's AdamW in place."""
        optim = self.config.optim
        plain = (optim.states, optim.weights, optim.name) == ("fp32", "fp32", "adamw")
        if plain or self.on_host or optim.in_backward:
            return
        groups = [group for stage in self.stages.values() for group in stage.groups]
        largest = max(group.largest_shard for group in groups)
        if optim.name == "muon":
            self.m.pass_by(BRIEF, 6 * 4 * largest)
        else:
            self.m.pass_by(BRIEF, self.fsdp.stepped * min(2**22, largest))

    # Forward

    def forward(self, stage: Stage) -> None:
        m, s = self.m, self.s
        self.fsdp.gather(stage, stage.root, forward=True)
        ahead = self.config.parallel.prefetch_blocks
        self.fsdp.ask_blocks(stage, range(min(ahead, len(stage.layers))))
        if stage.first:
            if self.config.parallel.tp > 1:
                m.pass_by(BRIEF, 2 * s.whole_x)
                m.pass_by(BRIEF, s.whole_x + s.whole_x + s.x)
            m.take(KEPT, s.x)
        else:
            m.move(PIPELINE, KEPT, s.x)
        m.take(KEPT, self.tables())
        for n, layer in enumerate(stage.layers):
            self.fsdp.gather(stage, stage.blocks[n], forward=True)
            experts = stage.experts[n]
            self.fsdp.ask_blocks(stage, range(n + 1, min(n + 1 + ahead, len(stage.layers))), n)
            self.block_forward(stage, layer, experts)
            if stage.blocks[n].again:
                self.fsdp.drop(stage.blocks[n])
        if stage.last:
            ends.head(m, s, stage.vocab, self.model.config.vocab_size)
        if self.config.recompute == "none" and not self.offloads:
            m.give(KEPT, len(stage.layers) * self.forgotten)
        m.give(BUFFERS, stage.held_output)
        stage.held_output = 0.0

    @property
    def forgotten(self) -> Bytes:
        """What routers' statistics keep of a block until the loss is found, and no longer."""
        return parts.statistics(self.s) - parts.statistics_kept(self.s)

    def block_forward(self, stage: Stage, layer: int, experts: Group | None) -> None:
        m, s, recompute = self.m, self.s, self.config.recompute
        before = m.held.get(KEPT, 0.0)
        parts.attention(m, s, layer)
        if experts is not None:
            self.fsdp.gather(stage, experts, forward=True)
        parts.moe(m, s)
        if experts is not None and experts.again:
            self.fsdp.drop(experts)
        kept = m.held[KEPT] - before
        if self.offloads:
            m.give(KEPT, kept)  # its input goes, what it returns is there
        elif recompute == "full":
            m.give(KEPT, kept - s.x)
        elif recompute == "selective":
            m.give(KEPT, kept - s.x)
            m.take(KEPT, parts.outputs_kept(s, layer)[0])

    def tables(self) -> Bytes:
        """Of a micro-batch: the angles of RoPE, and what a window sees."""
        s = self.s
        tables = s.attended * s.shape.head_dim * 4
        if not s.cuda and any(map(s.slides, range(s.shape.num_hidden_layers))):
            attended = 1 + parts.halo(s) if self.config.parallel.cp > 1 else 1
            tables += s.attended * attended * 2 * s.shape.sliding_window * s.item
        return tables

    # Backward

    def backward(self, stage: Stage, reduces: bool) -> None:
        m, s = self.m, self.s
        self.fsdp.ask(stage, len(stage.groups) - 1, len(stage.layers))
        if stage.last:
            ends.head_backward(m, s, stage.head_gradient)
            m.take(GRADIENTS, stage.norm_gradient)
            if isinstance(self.fsdp, InBackward):
                self.fsdp.step(stage.root, stage.head_gradient + stage.norm_gradient)
        for n in reversed(range(len(stage.layers))):
            self.block_backward(stage, n, reduces)
        if not stage.last:
            m.give(KEPT, s.x)  # what was sent on; its gradient is in a buffer
            m.take(BRIEF, s.x)
        m.take(GRADIENTS, stage.embedding_gradient)
        if not stage.first:
            m.take(PIPELINE, s.x)
        m.give(BRIEF, s.x)
        m.give(KEPT, self.tables())
        self.fsdp.after(stage, stage.root, reduces)
        if self.config.parallel.pp == 1:
            m.give(BUFFERS, stage.reducing)
            stage.reducing = 0.0

    def block_backward(self, stage: Stage, n: int, reduces: bool) -> None:
        m, s, layer = self.m, self.s, stage.layers[n]
        group, experts = stage.blocks[n], stage.experts[n]
        number = stage.groups.index(group)
        self.fsdp.gather(stage, group)
        self.fsdp.ask(stage, number, n)
        recompute = self.config.recompute
        if experts is not None:
            self.fsdp.gather(stage, experts, forward=recompute != "none")
            self.fsdp.ask(stage, number - 1)
        if self.offloads:
            m.take(KEPT, s.x if recompute == "full" else self.freed_by_block(layer))
        if recompute != "none":
            both = parts.outputs_kept(s, layer)[1] if recompute == "selective" else 0.0
            alone = parts.outputs_kept(s, layer)[0] - both if recompute == "selective" else 0.0
            parts.block(m, s, layer)
            m.give(KEPT, s.x + both + alone + self.forgotten)
        g = stage.gradients[n]
        parts.moe_backward(m, s, g)
        m.give(KEPT, parts.statistics_kept(s))
        if experts is not None:
            self.fsdp.after(stage, experts, reduces)
        parts.attention_backward(m, s, layer, g)
        self.fsdp.after(stage, group, reduces)

    def half_backward(self, stage: Stage, half: str) -> None:
        """Gradients of activations first; what they leave waits for those of the weights."""
        if stage.first:  # nobody waits for the first half
            if half == "W":
                self.backward(stage, reduces=False)
            return
        m, s = self.m, self.s
        if half == "I":
            if stage.last:
                m.take(KEPT, s.whole_x + s.x + s.tokens * 4)  # the graph stays
                m.take(LOSS, s.whole_x + stage.head_gradient)
                ends.head_backward(m, s, stage.head_gradient)
                m.give(GRADIENTS, stage.head_gradient)
            for n in reversed(range(len(stage.layers))):
                m.take(KEPT, self.freed_by_block(stage.layers[n]))  # it stays
                g = stage.gradients[n]
                parts.moe_backward(m, s, g)
                m.give(KEPT, parts.statistics_kept(s))
                m.give(GRADIENTS, g.experts + g.router + g.norms / 2)
                parts.attention_backward(m, s, stage.layers[n], g)
                m.give(GRADIENTS, g.o_proj + g.qkv + g.norms / 2)
                m.take(WAITING, self.waiting)
            m.give(BRIEF, s.x)
            return
        if stage.last:
            m.take(GRADIENTS, stage.head_gradient + stage.norm_gradient)
            m.give(KEPT, s.whole_x + s.x + s.tokens * 4)
            m.give(LOSS, s.whole_x + stage.head_gradient)
        else:
            m.give(KEPT, s.x)
        for n in reversed(range(len(stage.layers))):
            m.take(GRADIENTS, stage.blocks[n].gradients)
            m.pass_by(BRIEF, s.row)
            m.give(KEPT, self.freed_by_block(stage.layers[n]))
            self.fsdp.add_up(stage.blocks[n])
            if (experts := stage.experts[n]) is not None:
                m.take(GRADIENTS, experts.gradients)
                self.fsdp.add_up(experts)
        self.fsdp.add_up(stage.root)
        m.give(WAITING, len(stage.layers) * self.waiting)
        m.give(KEPT, self.tables())
        m.take(PIPELINE, s.x)

    @property
    def waiting(self) -> Bytes:
        """What the first half of a block's backward leaves for the second: gradients of outputs
        of its matrices and norms."""
        s = self.s
        scores = s.tokens * s.shape.num_local_experts * 4
        return 2 * s.x + s.whole_x + s.q + 2 * s.k + s.row + scores

    def freed_by_block(self, layer: int) -> Bytes:
        """What a block's backward lets go of, its input among it."""
        m = Ledger()
        none = Gradients(0, 0, 0, 0, 0)
        parts.moe_backward(m, self.s, none)
        parts.attention_backward(m, self.s, layer, none)
        return parts.statistics_kept(self.s) - m.held[KEPT]


def walks(
    model: Transformer, config: TrainConfig, axis_sizes: dict[str, int], device: str,
    state_bytes: StateBytes,
) -> list[Walk]:  # fmt: skip
    """For every rank of the axis pp, of the ranks there the one with most tokens and weights.

    Args:
        model: whole, on the meta device.
        axis_sizes: by `mesh.sizes`.
        device: "cpu" or "cuda".
    """
    weights = divided(model, config, state_bytes)
    return [
        Walk(model, weights, config, axis_sizes, device, rank) for rank in range(config.parallel.pp)
    ]
