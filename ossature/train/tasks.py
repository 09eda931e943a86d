"""Tasks of `ossature eval`, asked of the model as it is while a run goes on, on its own ranks."""

from __future__ import annotations

from ossature.config import TrainConfig
from ossature.eval import tasks
from ossature.eval.options import TaskOptions
from ossature.eval.subject import Subject, place_of
from ossature.train.setup import Parts


def task_options(config: TrainConfig) -> TaskOptions:
    return TaskOptions(limit=config.eval.task_items)


def check_tasks(config: TrainConfig) -> None:
    """Refuse tasks that there are not, before anything is built."""
    if config.eval.tasks:
        tasks.check(config.eval.tasks, task_options(config))


def ask_tasks(parts: Parts) -> dict[str, float]:
    """The value of every metric of eval.tasks, as task/metric.  All ranks make the same call.

    Every time the same questions are asked.
    """
    assert parts.tokenizer is not None
    subject = Subject(
        parts.model,
        parts.tokenizer,
        parts.ranks.device,
        place_of(parts.config.parallel, parts.ranks),
        batch_tokens=parts.config.micro_batch_tokens,
    )
    found = tasks.run(subject, parts.config.eval.tasks, task_options(parts.config))
    return {
        f"{name}/{metric}": values.summary()["value"]
        for name, outcome in found.items()
        for metric, values in outcome.metrics.items()
    }
