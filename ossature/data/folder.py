"""What every build of a data folder does: one at a time, progress in a line, there whole or not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class Made(Protocol):
    """What a part came to."""

    @property
    def tokens(self) -> int: ...

    @property
    def found(self) -> bool:
        """Made by an earlier start."""
        ...


Record = TypeVar("Record", bound=Made)


def refuse_existing(output: Path) -> None:
    """Raises ValueError unless the output is missing or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not an empty folder")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Hold the folder of work; a second build of the same output would spoil it."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{partial}: another build is at work there") from None
        try:
            yield
        except BaseException:
            if [path.name for path in partial.iterdir()] == ["lock"]:  # no work to keep
                shutil.rmtree(partial)
            raise


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def hashes_of(paths: Sequence[str]) -> Iterator[list[Any]]:
    """Futures of the hashes of files, computed by a thread while the workers encode."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield [pool.submit(sha256, path) for path in paths]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def shown(results: Iterator[tuple[int, Record]], sizes: Sequence[int], what: str) -> list[Record]:
    """All results in the order of their numbers; a line shows how far and how fast.

    Args:
        sizes: of each part, in any unit: only shares of the whole are shown.
    """
    records: dict[int, Record] = {}
    columns = [
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    hidden = not console.is_terminal  # else a file gets an empty line
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task(what, total=sum(sizes), rate="")
        began, made = time.monotonic(), 0
        for n, record in results:
            records[n] = record
            made += 0 if record.found else record.tokens
            rate = f"{made / (time.monotonic() - began):,.0f} tokens/s"
            progress.update(bar, advance=sizes[n], rate=rate)
    return [records[n] for n in range(len(sizes))]


def finish(folder: Path, output: Path) -> None:
    """Put every byte of a folder on the disk and give it its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.rename(output)


def num_workers(asked: int) -> int:
    """Processes to use: as asked, or (0) the cores this process may run on."""
    if asked:
        return asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
