"""Run a function over tasks in processes, and stop at the first one that fails.

Not concurrent.futures: there a process that is killed leaves its task unnamed, and an interrupt
waits for every task under way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    name: Callable[[Task], str],
) -> Iterator[tuple[int, Result]]:
    """Number and result of each task, as they are done; one worker is this process itself.

    Args:
        function: a function of a module, or a `functools.partial` of one.
        name: of a task, for messages.

    Raises:
        ValueError, OSError: as raised by the function.
        RuntimeError: a worker died of something else (its traceback is on stderr) or was killed.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from ((n, function(task)) for n, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")  # forked, the threads of `tokenizers` hang
    pool: dict[Connection, BaseProcess] = {}
    waiting = iter(range(len(tasks)))
    busy: dict[Connection, int] = {}

    def give(connection: Connection) -> None:
        number = next(waiting, None)
        if number is not None:
            busy[connection] = number
            connection.send(tasks[number])

    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()  # so that ours ends when the process does
            pool[ours] = process
            give(ours)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                number = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = pool[connection]
                    process.join()
                    raise RuntimeError(
                        f"{name(tasks[number])}: the worker on it died (exit code "
                        f"{process.exitcode}; -9 is often: out of memory)"
                    ) from None
                if isinstance(result, Exception):
                    raise result
                give(connection)
                yield number, result
    finally:
        for process in pool.values():
            process.terminate()
        for process in pool.values():
            process.join()


def _serve(connection: Connection, function: Callable[[Task], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        task = connection.recv()
        try:
            result = function(task)
        except (ValueError, OSError) as error:
            connection.send(error)
        else:
            connection.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
