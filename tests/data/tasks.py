"""What the workers of test_workers.py run: a process that is started finds it by its import."""

import os
import time
from pathlib import Path


def double(task: int) -> int:
    time.sleep(0.01 * (5 - task % 5))  # later tasks are done before earlier ones
    return 2 * task


def refuse_three(task: int) -> int:
    if task == 3:
        raise ValueError(f"file{task}: a bad line")
    return task


def die_at_three(task: int) -> int:
    if task == 3:
        os._exit(9)
    return task


def crash_at_three(task: int) -> int:
    return {0: 0, 1: 1, 2: 2}[task]


def sleep_and_tell(task: str) -> str:
    Path(task).write_text(str(os.getpid()))
    time.sleep(60)
    return task
