"""What a rank of a pipeline does in a step, in order, as torch's schedules have it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from ossature.config import ParallelConfig
from ossature.parallel.stages import stages_of, stages_per_rank


class Action(NamedTuple):
    kind: str
    """F forward, B backward, I and W the halves of a backward, R reduce the stage's gradients."""
    stage: int
    micro_batch: int = 0


def actions(config: ParallelConfig, rank: int, micro_batches: int) -> list[Action]:
    """Of one rank of the axis pp; torch makes the orders of several stages a rank."""
    if stages_per_rank(config) == 1:
        return [*_one_stage(config, rank, micro_batches), Action("R", rank)]
    kind = get_schedule_class(config.pp_schedule)
    count = config.pp * stages_per_rank(config)
    # What a schedule asks a stage while it is made; it runs none here.
    stages = [
        SimpleNamespace(
            num_stages=count,
            group_size=config.pp,
            group_rank=rank,
            stage_index=number,
            is_first=number == 0,
            is_last=number == count - 1,
            has_backward=True,
            submod=None,
        )
        for number in stages_of(rank, config)
    ]
    assert issubclass(kind, PipelineScheduleMulti)
    schedule = kind(stages, micro_batches, loss_fn=lambda *_: None, scale_grads=False)  # type: ignore[arg-type]
    found: list[Action] = []
    for action in schedule.pipeline_order_with_comms[rank]:  # type: ignore[attr-defined]
        for step in action.sub_actions or (action,):
            word = _WORDS.get(step.computation_type.name)
            if word is not None:
                found.append(Action(word, step.stage_index, step.microbatch_index or 0))
    return found


_WORDS = {
    "FORWARD": "F",
    "FULL_BACKWARD": "B",
    "BACKWARD_INPUT": "I",
    "BACKWARD_WEIGHT": "W",
    "REDUCE_GRAD": "R",
}


def _one_stage(config: ParallelConfig, rank: int, micro_batches: int) -> list[Action]:
    """GPipe: everything forward, then everything back; 1F1B: by turns, after a start."""
    ahead = config.pp - rank if config.pp_schedule == "1F1B" else micro_batches
    ahead = min(ahead, micro_batches)
    order = [Action("F", rank, n) for n in range(ahead)]
    for n in range(micro_batches):
        order.append(Action("B", rank, n))
        if ahead + n < micro_batches:
            order.append(Action("F", rank, ahead + n))
    return order
