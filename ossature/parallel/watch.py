"""Signs of life of the ranks: when one dies, the others say which and end, and do not hang.

A rank whose process is killed leaves the others in a collective that never returns (NCCL), or that
fails with the address of a socket (gloo).  So every rank has a thread that counts up a key of its
own in the store where the ranks met, and looks at the key of the next rank.  A key that stands
still for half of the timeout, or for three looks once a collective has failed somewhere, is a dead
rank: its watcher writes that down, every other rank reads it, prints it and ends.  Four small
requests a rank and look, whatever the number of ranks.

The thread ends the whole process, since nothing else can: the main thread waits inside of C++.
A rank that fails by itself, with an error, writes down that instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ossature.parallel.environment import Place


class RankLost(ConnectionError):
    """Another rank is gone; the message says what is known."""


def meet(place: Place, timeout_seconds: int, stopping: Callable[[], bool] = lambda: False) -> Store:
    """A connection to the store where the ranks meet; rank 0 opens it, unless torchrun has.

    Raises:
        OSError: the port is taken.
        RankLost: nobody answers there in time, or this process is told to end meanwhile.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    where = f"MASTER_ADDR:MASTER_PORT ({place.address}:{place.port})"
    whole = timedelta(seconds=timeout_seconds)
    if place.rank == 0 and not agent:
        try:
            return _connect(place, whole, whole, host=True)
        except dist.DistError as error:
            raise OSError(f"rank 0 cannot open {where}: {_first_line(error)}") from error
    # A plain socket first: torch's own would hear nothing else meanwhile, and log every attempt.
    deadline = time.monotonic() + 0.8 * timeout_seconds
    missing = "torchrun's agent" if agent else "rank 0"
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=2).close()
            return _connect(place, whole, whole)
        except (OSError, dist.DistError) as error:
            if stopping():
                raise RankLost(f"rank {place.rank} was told to end before {missing} came") from None
            if time.monotonic() > deadline:
                raise RankLost(
                    f"rank {place.rank} ends: {missing} has not come to {where} for "
                    f"{0.8 * timeout_seconds:.0f} s: {_first_line(error)}"
                ) from error
            time.sleep(0.2)


def _connect(place: Place, wait: timedelta, later: timedelta, host: bool = False) -> Store:
    """One connection, opened within `wait`; each request takes at most `later`."""
    store = TCPStore(place.address, place.port, None, host, wait, wait_for_workers=False)
    store.set_timeout(later)
    # torchrun's store outlives a restart: what ranks of an earlier start wrote there is theirs.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
    return PrefixStore(f"ossature/{attempt}", store)


class Watch(threading.Thread):
    """Beats for this rank and listens to the next one, until `leave`.

    Args:
        timeout_seconds: within which every rank ends after one has died.  One that has not come
            has nearly all of it.
    """

    def __init__(self, place: Place, timeout_seconds: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.place, self.timeout_seconds = place, timeout_seconds
        self.interval = min(timeout_seconds / 10, 5)
        self.left = threading.Event()
        # A connection of its own: the main thread may be waiting on the other one.
        whole = timedelta(seconds=timeout_seconds)
        self.store = _connect(place, whole, whole / 2)

    def run(self) -> None:
        place, following = self.place, (self.place.rank + 1) % self.place.world
        # Silence is counted in looks, not by the clock: a job that is suspended has not died.
        beats, silent = 0, 0.0
        while not self.left.is_set():
            try:
                self.store.add(f"beat{place.rank}", 1)
                now = self.store.add(f"beat{following}", 0)  # 0 if it has never beaten
                beats, silent = now, 0.0 if now != beats else silent + self.interval
                share = 0.5 if beats else 0.8
                failed = beats and self.store.check(["failed"])  # a collective, on some rank
                if silent > (3 * self.interval if failed else share * self.timeout_seconds):
                    said = "given no sign of life" if beats else "not come"
                    self.announce(f"rank {following} has {said} for {silent:.0f} s")
                found = self.store.get("end").decode() if self.store.check(["end"]) else ""
            except dist.DistError:
                agent = "TORCHELASTIC_RUN_ID" in os.environ
                found = f"{'the agent' if agent else 'rank 0'} at {place.address} is gone"
            if found and not self.left.wait(self.interval):
                end(f"{found}; rank {place.rank} ends")
            self.left.wait(self.interval)

    def wait_for_all(self, stopping: Callable[[], bool]) -> None:
        """Until every rank has come; the thread ends this process if one does not in time.

        Raises:
            RankLost: this process is told to end meanwhile.
        """
        self.store.add("came", 1)
        while self.store.add("came", 0) < self.place.world:
            if stopping():
                raise RankLost(f"rank {self.place.rank} was told to end before all ranks had come")
            time.sleep(0.2)

    def announce(self, what: str) -> None:
        """Tell all ranks why they end; the first one to say something is heard."""
        with contextlib.suppress(dist.DistError):  # without a store they notice that
            self.store.compare_set("end", "", what)

    def explain(self, error: BaseException, stopping: Callable[[], bool]) -> None:
        """What to do about an error that leaves the run: our own is told to all the others.

        Of a failed collective another rank is the cause: wait for the thread, which finds out
        which and ends this process.  Returns if no rank has died.

        Raises:
            RankLost: this process is told to end meanwhile, as torchrun does with the other ranks.
        """
        if isinstance(error, RankLost):
            return
        if not is_communication(error):
            self.announce(f"rank {self.place.rank} failed: {_first_line(error)}")
            return
        with contextlib.suppress(dist.DistError):
            self.store.set("failed", "")
        deadline = time.monotonic() + self.timeout_seconds
        while time.monotonic() < deadline:
            if stopping():
                raise RankLost(
                    f"rank {self.place.rank} has lost another one, and was told to end"
                ) from error
            time.sleep(0.05)

    def leave(self) -> None:
        """No more beats: this rank ends as it should, and the others know."""
        self.left.set()


def is_communication(error: BaseException) -> bool:
    """Whether a collective failed, or what it was called for: the cause may be another rank."""
    link: BaseException | None = error
    while link is not None:
        # gloo throws plain RuntimeErrors that begin with the place in its source.
        if isinstance(link, dist.DistError) or "gloo/transport/" in str(link):
            return True
        link = link.__cause__ or link.__context__
    return False


def end(message: str) -> None:
    """Say why, and end this process whatever its other threads are waiting for."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
