import os
import signal
import subprocess
import sys
import time

import pytest

from ossature.data.workers import run
from tests.data import tasks


def name(task: int) -> str:
    return f"file{task}"


def test_every_task_is_done_once():
    for workers in (1, 3):
        assert sorted(run(tasks.double, range(12), workers, name)) == [
            (n, 2 * n) for n in range(12)
        ]


def test_the_error_of_a_worker_is_raised():
    with pytest.raises(ValueError, match="file3: a bad line"):
        list(run(tasks.refuse_three, range(8), 2, name))


@pytest.mark.parametrize("function", [tasks.die_at_three, tasks.crash_at_three])
def test_a_worker_that_dies_stops_the_run_and_names_its_task(function, capfd):
    with pytest.raises(RuntimeError, match="file3: the worker on it died"):
        list(run(function, range(4), 2, name))
    if function is tasks.crash_at_three:
        assert "KeyError: 3" in capfd.readouterr().err


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    program = (
        "from ossature.data.workers import run\nfrom tests.data.tasks import sleep_and_tell\n"
        "if __name__ == '__main__':\n"
        f"    list(run(sleep_and_tell, [r'{tmp_path}/a', r'{tmp_path}/b'], 2, str))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    files = [tmp_path / "a", tmp_path / "b"]
    wait(lambda: all(file.exists() and file.read_text() for file in files))
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    for file in files:
        wait(lambda file=file: not alive(int(file.read_text())))


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
