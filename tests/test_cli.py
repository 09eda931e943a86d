"""The command line as a user meets it: a process, its two streams and its exit status."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ossature import cli
from tests.golden import ROOT

UNSET = ("OSSATURE_TRACEBACK", "PYTHONUNBUFFERED")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNSET}


def ossature(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ossature", *words],
        env={**ENVIRONMENT, **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_answers_in_less_than_0_6_seconds():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert ossature("--help").returncode == 0
        times.append(time.perf_counter() - start)

    assert min(times) < 0.6, times


def test_help_has_one_line_a_command():
    lines = ossature("--help").stdout.splitlines()

    for verb in cli.VERBS:
        assert sum(line.strip().startswith(f"{verb} ") for line in lines) == 1, verb


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_command_exists_and_explains_itself_without_torch(verb: str):
    program = (
        "import sys, ossature.cli as cli\n"
        "try:\n"
        f"    cli.main({verb.split()} + ['--help'])\n"
        "finally:\n"
        "    print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "False\n")
    assert f"ossature {verb}" in done.stdout


def test_no_command_is_an_error_and_shows_the_commands():
    done = ossature()

    assert (done.returncode, done.stdout) == (2, "")
    assert "data build" in done.stderr


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["trian", "x.toml"], "did you mean train?"),
        (["data", "biuld"], "did you mean data build?"),
        (["convrt", "a", "b"], "did you mean convert?"),
        (["data"], "say which: data build"),
        (["qwertz"], "`ossature --help` lists the commands"),
    ],
)
def test_a_mistyped_command_is_told_the_nearest(words: list[str], hint: str):
    done = ossature(*words)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert hint in done.stderr


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line whose command raises `error`."""

    def command(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "command_for_tests", command, raising=False)
    monkeypatch.setitem(cli.VERBS, "fail", "ossature.cli:command_for_tests")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delenv("OSSATURE_TRACEBACK", raising=False)
    return ["fail"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("data.path: no such folder"), "error: data.path: no such folder\n"),
        (ValueError("two\n  lines"), "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "a/b"), "error: a/b: No such file\n"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    assert cli.main(raising(error, monkeypatch)) == 2
    assert capsys.readouterr() == ("", line)


def test_an_unknown_tensor_is_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = importlib.import_module("ossature.convert.names")

    assert cli.main(raising(names.UnknownTensor("no place for x.y"), monkeypatch)) == 2
    assert capsys.readouterr().err == "error: no place for x.y\n"


def test_our_own_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyError):
        cli.main(raising(KeyError("ours"), monkeypatch))


def test_a_traceback_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch):
    words = raising(ValueError("x"), monkeypatch)
    monkeypatch.setenv("OSSATURE_TRACEBACK", "1")

    with pytest.raises(ValueError, match="x"):
        cli.main(words)


def test_an_interrupt_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(raising(KeyboardInterrupt(), monkeypatch)) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_command_that_is_told_to_end_cleans_up(tmp_path: Path):
    program = (
        "import sys, time, ossature.cli as cli\n"
        "def wait(argv):\n"
        "    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('clean', flush=True)\n"
        "cli.wait = wait; cli.VERBS['wait'] = 'ossature.cli:wait'\n"
        "sys.exit(cli.main(['wait']))"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)

    rest, _ = child.communicate(timeout=30)

    assert (rest, child.returncode) == ("clean\n", 143)


def test_a_reader_that_goes_away_is_no_error():
    """`ossature --help | true`"""
    child = subprocess.Popen(
        [sys.executable, "-m", "ossature", "--help"],
        env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()

    assert (child.wait(timeout=30), errors) == (141, "")


def test_the_version_is_the_package_s():
    from importlib.metadata import version

    assert ossature("--version").stdout == f"ossature {version('ossature')}\n"
