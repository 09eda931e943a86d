"""Several gloo ranks inside a test, as `ossature prove` starts them."""

from collections.abc import Callable
from typing import Any

from ossature.parallel import spawn

CLEAN = spawn.CLEAN
spawn.preload("ossature.train.loop", "ossature.train.prove", "tests.small_runs")


def run_ranks(world: int, function: Callable[..., Any], *args: Any, seconds: int = 90) -> list:
    """`function(rank, world, *args)` on `world` ranks; their results, rank 0 first.

    A rank that raises fails the test with its traceback, and so does the deadline.
    """
    return spawn.run_ranks(world, function, *args, seconds=seconds)
