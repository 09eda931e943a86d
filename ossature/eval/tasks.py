"""Names of tasks -> what they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ossature.eval.bits import bits_per_byte
from ossature.eval.chat import harmony
from ossature.eval.needle import lengths_of, needle
from ossature.eval.options import TaskOptions
from ossature.eval.puzzles import arithmetic, copying
from ossature.eval.questions import questions, read_questions
from ossature.eval.results import Outcome
from ossature.eval.subject import Subject

GENERATED: dict[str, Callable[[Subject, TaskOptions], Outcome]] = {
    "arithmetic": arithmetic,
    "copying": copying,
    "harmony": harmony,
}
WITH_ARGUMENT: dict[str, Callable[[Subject, TaskOptions, str], Outcome]] = {
    "bits_per_byte": bits_per_byte,
    "needle": needle,
}


def check(names: Sequence[str], options: TaskOptions) -> None:
    """Refuse tasks that there are not, before any model is loaded.

    Raises:
        ValueError: names the task and the rule.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tasks: {name} is given twice")
        kind, colon, argument = name.partition(":")
        if name.endswith(".jsonl") and kind not in WITH_ARGUMENT:
            read_questions(Path(name), options)
        elif kind in GENERATED and colon:
            raise ValueError(f"tasks: {kind} takes nothing after a colon, not {argument!r}")
        elif kind == "needle":
            lengths_of(argument)
        elif kind == "bits_per_byte" and not (argument and Path(argument).exists()):
            raise ValueError(f"tasks: {name}: no such file or folder: bits_per_byte:PATH")
    if others := of_harness(names):
        from ossature.eval.harness import check_tasks

        check_tasks(others, options, [*GENERATED, *WITH_ARGUMENT])


def of_harness(names: Sequence[str]) -> list[str]:
    """Those that are lm-eval's."""
    ours = {*GENERATED, *WITH_ARGUMENT}
    return [n for n in names if n.partition(":")[0] not in ours and not n.endswith(".jsonl")]


def run(subject: Subject, names: Sequence[str], options: TaskOptions) -> dict[str, Outcome]:
    """All tasks, in the order of their names; lm-eval's come last, and groups of its as parts."""
    found: dict[str, Outcome] = {}
    others = of_harness(names)
    for name in names:
        if name in others:
            continue
        kind, _, argument = name.partition(":")
        if kind in GENERATED:
            found[name] = GENERATED[kind](subject, options)
        elif kind in WITH_ARGUMENT:
            found[name] = WITH_ARGUMENT[kind](subject, options, argument)
        else:
            found[name] = questions(subject, options, Path(name))
    if others:
        from ossature.eval.harness import evaluate

        found |= evaluate(subject, others, options)
    return found
