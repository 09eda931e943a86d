"""What a person sees of a run: a live line on a terminal, plain lines elsewhere; rank 0 only."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ossature.train.metrics import Record


class Screen:
    """Args:
    steps: of the whole run.
    every_steps: plain lines only every so many steps.
    speaks: False on every rank but the first.
    """

    def __init__(
        self, steps: int, every_steps: int, speaks: bool, file: TextIO | None = None
    ) -> None:
        self.steps, self.every_steps, self.speaks = steps, every_steps, speaks
        self.console = Console(
            file=file, markup=False, highlight=False, soft_wrap=True, emoji=False
        )
        self.live: Progress | None = None
        self.began: tuple[int, float] | None = None

    def say(self, text: str = "") -> None:
        """One line, above the live one."""
        if self.speaks:
            self.console.print(text)

    def begin(self, step: int) -> None:
        self.began = (step, time.monotonic())
        if self.speaks and self.console.is_terminal:
            self.live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=self.console,
            )
            self.task = self.live.add_task("", total=self.steps, completed=step)
            self.live.start()

    def show(self, record: Record) -> None:
        if not self.speaks:
            return
        step, words = record["step"], self.words(record)
        if self.live is not None:
            self.live.update(self.task, completed=step, description=words)
        elif step % self.every_steps == 0 or step == self.steps:
            self.say(f"step {step:>{len(str(self.steps))}}/{self.steps}  {words}")

    def words(self, record: Record) -> str:
        parts = [
            f"loss {record['loss']:.4f}",
            f"grad norm {record['grad_norm']:.3f}",
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
        if record["skipped_steps"]:
            parts.append(f"{record['skipped_steps']} skipped")
        parts.append(f"{self.left(record['step'])} left")
        return "  ".join(parts)

    def left(self, step: int) -> timedelta:
        """Time to the last step at the pace so far, validation and saving included."""
        assert self.began is not None
        first, then = self.began
        pace = (time.monotonic() - then) / max(1, step - first)
        return timedelta(seconds=round(pace * (self.steps - step)))

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None
