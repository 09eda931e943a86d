"""`ossature train RUN.toml [--key value ...]`, alone or under torchrun or srun."""

from __future__ import annotations

import shlex
import sys

from ossature.config import TrainConfig, parse
from ossature.parallel.environment import Place, environment
from ossature.train.signals import StopRequest


def main(argv: list[str]) -> int:
    """Train; 0 also after a signal, 1 for a run that could not go on, 2 for a config in error."""
    place = environment()
    first = place.rank == 0
    try:
        config = parse(TrainConfig, argv, prog="ossature train")
    except ValueError:
        if first:
            raise
        return 2  # every rank has read the same words: one of them says so
    with StopRequest() as stop:  # from here on, before the seconds that torch takes to load
        from ossature.parallel.watch import RankLost
        from ossature.train.loop import ConfigError, TrainingFailed, train

        try:
            train(config, again=_again(argv, place), stop=stop)
        except ConfigError:
            if first:
                raise
            return 2
        except TrainingFailed as failure:
            if first:
                print(f"error: {failure}", file=sys.stderr)
            return 1
        except RankLost as failure:
            print(f"error: {failure}", file=sys.stderr)  # every rank: which one is read is chance
            return 1
    return 0


def _again(argv: list[str], place: Place) -> str:
    command = f"ossature train {shlex.join(argv)}"
    if place.world == 1:
        return command
    if not place.one_machine:
        return f"the same launch of {command}"
    # Without the dashes torchrun takes our --run for one of its own options.
    return f"torchrun --nproc-per-node {place.world} -m -- {command}"
