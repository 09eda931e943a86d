"""The engine in a thread of its own, and the requests that other threads have given it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from ossature.sample.engine import Engine
from ossature.sample.request import Event, Request

Sink = Callable[[int, Event | None], None]
"""Told of every event of a request with its number, from the engine's thread; None: there comes
nothing any more, since the engine has failed."""


class EngineFailed(Exception):
    """The engine's thread has ended with an error; no request can be answered any more."""


@dataclass
class _Entry:
    sink: Sink | None
    left: int
    """Texts that have not ended."""


class Worker:
    """Steps an engine while there is something to do.

    Args:
        idle_seconds: a lockstep engine steps at least so often: other ranks would give up waiting.
    """

    def __init__(self, engine: Engine, idle_seconds: float = 20.0) -> None:
        self.engine, self._idle_seconds = engine, idle_seconds
        self.on_failure: Callable[[], None] = lambda: None
        """Called once if the engine fails, from its thread."""
        self.failure = ""
        """What the engine failed with; empty while it is well."""
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Let the engine and the other ranks come to an end, whatever they are doing."""
        self._ending = True
        self._thread.join()

    @property
    def load(self) -> int:
        """Texts that were asked for and have not ended."""
        with self._lock:
            return sum(entry.left for entry in self._entries.values())

    def submit(self, request: Request, sink: Sink) -> int:
        """Give the engine a request; returns its number.

        Raises:
            ValueError: it can never be run.
            EngineFailed
        """
        with self._lock:  # no event of it is looked up before it has its entry
            if self.failure:
                raise EngineFailed(self.failure)
            number = self.engine.submit(request)
            self._entries[number] = _Entry(sink, request.options.samples)
        return number

    def cancel(self, number: int) -> None:
        """End a request; its sink hears no more of it."""
        with self._lock:
            entry = self._entries.get(number)
            if entry is not None and entry.sink is not None:
                entry.sink = None
                self.engine.cancel(number)

    def _run(self) -> None:
        try:
            stepped = time.monotonic()
            while not self._ending:
                idle = time.monotonic() - stepped
                if self.engine.wait(0.2) or (self.engine.lockstep and idle > self._idle_seconds):
                    self._tell(self.engine.step())
                    stepped = time.monotonic()
            self.engine.close()
            if self.engine.lockstep:
                self.engine.step()  # takes the word to the other ranks
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            with self._lock:
                self.failure = f"{type(error).__name__}: {error}".split("\n")[0]
                left, self._entries = self._entries, {}
            for number, entry in left.items():
                if entry.sink is not None:
                    entry.sink(number, None)
            self.on_failure()

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            with self._lock:
                entry = self._entries[event.request]
                if event.finished:
                    entry.left -= 1
                    if not entry.left:
                        del self._entries[event.request]
                sink = entry.sink
            if sink is not None:
                sink(event.request, event)
