"""Pipeline stages: which blocks each rank of the axis `pp` has, and the module that runs them.

Ranks hold one stage or several.  With several they lie in loops (rank r has stages r, r + ranks,
...) or, for schedules whose name ends in V or begins with it, in a V (r and 2 x ranks - 1 - r), so
that the first rank has the first stage and the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ossature.config import ParallelConfig, TrainConfig
from ossature.model.attention import Layout
from ossature.model.cache import Prompt, Step
from ossature.model.config import ModelConfig
from ossature.model.flops import matmul_parameters
from ossature.model.moe import RouterLog, RouterStatistics
from ossature.model.transformer import Transformer, through_blocks, turns

V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")


def stages_per_rank(config: ParallelConfig) -> int:
    """One where there is no pipeline, whatever its schedule would be."""
    if config.pp == 1:
        return 1
    if config.pp_schedule in V_SCHEDULES:
        return 2
    return config.pp_chunks if config.pp_schedule == "Interleaved1F1B" else 1


def stages_of(rank: int, config: ParallelConfig) -> list[int]:
    """Numbers of the stages that rank `rank` of the axis holds."""
    if config.pp > 1 and config.pp_schedule in V_SCHEDULES:
        return [rank, 2 * config.pp - 1 - rank]
    return [rank + config.pp * turn for turn in range(stages_per_rank(config))]


def check_pipeline(run: TrainConfig, num_hidden_layers: int, micro_batches: int) -> None:
    """Refuse what the schedule cannot do.

    Args:
        micro_batches: of one rank in one optimizer step.

    Raises:
        ValueError: too few layers or micro-batches, or not a multiple.
    """
    config = run.parallel
    if config.pp == 1:
        return
    schedule, per_rank = config.pp_schedule, stages_per_rank(config)
    stages = config.pp * per_rank
    if stages > num_hidden_layers:
        raise ValueError(
            f"parallel.pp ({config.pp}) x stages a rank of {schedule} ({per_rank}) must be at "
            f"most num_hidden_layers ({num_hidden_layers})"
        )
    least = {"1F1B": config.pp, "DualPipeV": stages}.get(schedule, 1)
    if micro_batches < least:
        raise ValueError(
            f"parallel.pp_schedule {schedule} needs at least {least} micro-batches a step on each "
            f"rank (global_batch_tokens / (micro_batch_tokens x data ranks) is {micro_batches})"
        )
    if schedule == "Interleaved1F1B" and micro_batches % max(1, micro_batches // config.pp):
        raise ValueError(
            f"parallel.pp_schedule {schedule} needs micro-batches of a step on each rank "
            f"({micro_batches}) to be a multiple of parallel.pp ({config.pp})"
        )


def stage_layers(config: ModelConfig, stages: int) -> list[range]:
    """The blocks of each stage: the slowest stage is as fast as can be.

    A stage takes the time of the weights a token is multiplied with in it: the head is worth 4.6
    blocks of the 20B model.  The embedding is a lookup, but its weights take memory: what could go
    to several stages goes to the last of them.  Every stage has a block.
    """
    layers = config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    block = (matmul_parameters(config) - head) / layers
    sizes = [1] * stages
    for _ in range(layers - stages):  # one more where that makes the fastest stage, or a later one
        costs = [size + (head / block if n == stages - 1 else 0) for n, size in enumerate(sizes)]
        sizes[min(range(stages), key=lambda n: (costs[n], -n))] += 1
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class View(NamedTuple):
    """How a rank sees whole rows: everything, or with context parallelism its part of them."""

    layout: Callable[[Tensor], Layout]
    """Documents of whole rows -> what this rank's tokens see."""
    cut: Callable[[Tensor], Tensor]
    """(batch, seq) -> this rank's tokens."""


class Stage(nn.Module):
    """Some blocks of a model in a row; the first stage has its embedding, the last norm and head.

    It shares its modules with the model, and they have the same names.
    """

    def __init__(self, model: Transformer, layers: Iterable[int], first: bool, last: bool) -> None:
        super().__init__()
        self.config = model.config
        self.embedding = model.embedding if first else None
        self.blocks = nn.ModuleDict({str(n): model.blocks[str(n)] for n in layers})
        self.norm = model.norm if last else None
        self.lm_head = model.lm_head if last else None
        self.view: View
        self.note: Callable[[int, RouterStatistics], None] | None = None
        """Told the router's statistics of each of its layers, in every forward pass."""

    def forward(
        self,
        x: Tensor,
        sums: Tensor | None = None,
        *,
        document: Tensor,
        position: Tensor,
        targets: Tensor | None = None,
        layout: Layout | Prompt | Step | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, seq, hidden); from the last stage the summed loss, (1,), or logits.

        Args:
            x: tokens for the first stage, else what the stage before returned.
            sums: statistics of the routers so far, packed by `pack`; returned with this stage's
                added, if given, and differentiable.
            document: of whole rows; position, targets: of this rank's tokens.
            layout: default from `document`.
        """
        counted = self.view.cut(document) >= 0 if self.note or sums is not None else None
        layout = self.view.layout(document) if layout is None else layout
        log = None if counted is None else RouterLog()
        x = x if self.embedding is None else self.embedding(x)
        turn = turns(self.config, layout, position)
        x = through_blocks(self.blocks, x, turn, layout, counted, log)
        if log is not None:
            for number, statistics in zip(self.blocks, log.layers, strict=True):
                if self.note is not None:
                    self.note(int(number), statistics)
                sums = None if sums is None else sums + pack(statistics)
        if self.norm is not None and self.lm_head is not None:
            x = x if isinstance(layout, Layout) else x[:, -1:]
            x = self.lm_head(self.norm(x), targets)
            x = x if targets is None else torch.stack([x])
        return x if sums is None else (x, sums)


def pack(statistics: RouterStatistics) -> Tensor:
    """Sums that a router loss needs, in one fp32 vector: counts, probability, z, tokens."""
    counts, tokens = statistics.counts.float(), statistics.tokens.float()
    return torch.cat([counts, statistics.probability, torch.stack([statistics.z, tokens])])


def unpack(sums: Tensor) -> RouterStatistics:
    """The sums over all layers as if they were one."""
    counts, probability = sums[:-2].chunk(2)
    entropy = torch.zeros_like(sums[-2])
    return RouterStatistics(counts.detach(), probability, sums[-2], entropy, sums[-1].detach())
