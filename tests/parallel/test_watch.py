"""Ranks that watch each other: who is named, how soon, and what a rank says of its own errors.

The ranks are threads of this process, with the store of a real launch between them.
"""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from ossature.parallel import watch
from ossature.parallel.environment import Place
from ossature.parallel.watch import RankLost, Watch, is_communication, meet
from tests.golden import ROOT

GLOO = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7393."


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What ranks say as they end."""
    said: list[str] = []
    monkeypatch.setattr(watch, "end", said.append)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return said


@pytest.fixture
def ranks(ended):
    """Three watched ranks; one that does not answer for a second is dead."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [Place(rank, rank, 3, "127.0.0.1", port, True) for rank in range(3)]
    stores = [meet(place, 2) for place in places]
    watches = [Watch(place, 2) for place in places]
    yield watches
    for one in watches:
        one.leave()
    for one in watches:
        if one.is_alive():
            one.join()
    del stores


def until(condition, seconds: float = 10) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.01)
    return time.monotonic() - began


def test_the_rank_whose_beat_stops_is_named_by_all_others_in_time(ranks, ended):
    for one in ranks:
        one.start()
    time.sleep(0.5)
    assert ended == []
    ranks[1].leave()
    assert until(lambda: len(set(ended)) == 2) < 2
    assert {line.partition(" has ")[0] for line in ended} == {"rank 1"}
    assert {line[-11:] for line in ended} == {"rank 0 ends", "rank 2 ends"}


def test_a_rank_that_does_not_come_is_named(ranks, ended):
    ranks[0].start()
    ranks[1].start()
    until(lambda: len(set(ended)) == 2)
    assert {line.partition(" for ")[0] for line in ended} == {"rank 2 has not come"}


def test_a_rank_that_fails_tells_the_others_what_happened(ranks, ended):
    for one in ranks:
        one.start()
    ranks[2].explain(OSError("no space left\non device"), lambda: False)
    ranks[2].leave()
    assert until(lambda: len(set(ended)) == 2) < 1
    assert {line.partition("; ")[0] for line in ended} == {"rank 2 failed: OSError: no space left"}


def test_a_failed_collective_is_not_blamed_on_the_rank_that_noticed(ranks, ended):
    for one in ranks:
        one.start()
    ranks[1].leave()  # it is dead, and its neighbours see their connections close
    with pytest.raises(RankLost, match="rank 2 has lost another one, and was told to end"):
        ranks[2].explain(RuntimeError(GLOO), lambda: len(set(ended)) == 2)
    assert all(line.startswith("rank 1 has given no sign of life") for line in ended)


def test_a_rank_that_leaves_with_the_others_is_no_dead_rank(ranks, ended):
    for one in ranks:
        one.start()
    for one in ranks:
        one.leave()
    time.sleep(1.5)
    assert ended == []


def test_what_a_failed_collective_raises_is_known_through_what_it_is_wrapped_in():
    try:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError as cause:
            raise OSError("runs/a: not written") from cause
    except OSError as error:
        assert is_communication(error)
    assert is_communication(dist.DistBackendError("NCCL error"))
    assert not is_communication(RuntimeError("shape mismatch"))


def test_rank_0_that_never_comes_is_named(ended):
    place = Place(1, 1, 2, "127.0.0.1", 9, True)
    with pytest.raises(RankLost, match=r"^rank 1 ends: rank 0 has not come to .*127.0.0.1:9"):
        meet(place, 1)


def test_who_waits_for_others_can_be_told_to_end(ranks):
    """torchrun's agent does so after a rank has died at the start."""
    with pytest.raises(RankLost, match="rank 1 was told to end before rank 0 came"):
        meet(Place(1, 1, 2, "127.0.0.1", 9, True), 30, lambda: True)
    with pytest.raises(RankLost, match="rank 2 was told to end before all ranks had come"):
        ranks[2].wait_for_all(lambda: True)
    came = [threading.Thread(target=one.wait_for_all, args=(lambda: False,)) for one in ranks[:2]]
    for thread in came:
        thread.start()
    for thread in came:
        thread.join(10)
    assert not any(thread.is_alive() for thread in came)


@pytest.mark.slow
def test_a_killed_rank_is_named_in_time_and_nothing_is_lost():
    """One kill under an agent that starts all ranks again, one without; compared bit for bit."""
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_rank.py", "--kills", "2", "--steps", "12"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 kills, ") == 2 and done.stdout.count("bitwise equal") == 2
