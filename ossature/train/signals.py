"""SIGTERM and SIGINT: finish the step, save, leave.  A second one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, notes that a signal asked to stop; only in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._time = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # torchrun passes on what the terminal has sent already: the echo is no second request.
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._time < 5
        if self.asked and not echo:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.asked:
            self.asked, self._time = True, time.monotonic()
