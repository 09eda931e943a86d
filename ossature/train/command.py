"""`ossature train RUN.toml [--key value ...]`, alone or under torchrun."""

from __future__ import annotations

import os
import shlex
import sys

from ossature.config import TrainConfig, parse
from ossature.train.signals import StopRequest


def main(argv: list[str]) -> int:
    """Train; 0 also after a signal, 1 for a run that could not go on, 2 for a config in error."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = parse(TrainConfig, argv, prog="ossature train")
    except ValueError:
        if first:
            raise
        return 2  # every rank has read the same words: one of them says so
    with StopRequest() as stop:  # from here on, before the seconds that torch takes to load
        from ossature.train.loop import ConfigError, TrainingFailed, train

        try:
            train(config, again=_again(argv), stop=stop)
        except ConfigError:
            if first:
                raise
            return 2
        except TrainingFailed as failure:
            if first:
                print(f"error: {failure}", file=sys.stderr)
            return 1
    return 0


def _again(argv: list[str]) -> str:
    ranks = os.environ.get("WORLD_SIZE", "1")
    # Without the dashes torchrun takes our --run for one of its own options.
    launch = "ossature" if ranks == "1" else f"torchrun --nproc-per-node {ranks} -m -- ossature"
    return f"{launch} train {shlex.join(argv)}"
