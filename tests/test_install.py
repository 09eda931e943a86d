"""Which torch `scripts/install.sh` asks pip for, with a pip and a GPU that are made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have one torch")

PIP = """#!/bin/bash
echo "$@" >> "$PIP_LOG"
case "$*" in *"$PIP_LACKS"*) [[ "$*" == *"$PIP_UNLESS"* ]] || exit 1;; esac
"""
LOCAL = "torch==2.13.0+cpu"
INDEX = "https://download.pytorch.org/whl/cpu"


def asked(folder: Path, *, gpu: bool = False, **environment: str) -> tuple[int, list[str]]:
    """Exit status, and what pip was asked to install, call by call."""
    venv, tools = folder / "venv" / "bin", folder / "tools"
    venv.mkdir(parents=True)
    tools.mkdir()
    (venv / "python").write_text(PIP)
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if gpu else 1}\n")
    for program in (venv / "python", tools / "nvidia-smi"):
        program.chmod(0o755)
    log = folder / "log"
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "install.sh", folder / "venv"],
        env={"PATH": f"{tools}:{os.environ['PATH']}", "PIP_LOG": str(log), "PIP_LACKS": "nothing",
             "PIP_UNLESS": "never", **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, log.read_text().splitlines()


def test_without_a_gpu_the_cpu_build_at_hand_is_taken(tmp_path: Path):
    status, calls = asked(tmp_path)

    assert status == 0
    assert calls[0].endswith(f"install --quiet {LOCAL}")
    assert "constraints.txt" in calls[1] and calls[1].endswith(".[dev]")
    assert len(calls) == 2


def test_without_a_cpu_build_at_hand_pytorchs_own_index_is_asked(tmp_path: Path):
    status, calls = asked(tmp_path, PIP_LACKS=LOCAL, PIP_UNLESS=INDEX)

    assert status == 0
    assert LOCAL in calls[1] and INDEX in calls[1]
    assert INDEX not in calls[2]


def test_no_cpu_build_anywhere_is_an_error_and_not_gigabytes_of_cuda(tmp_path: Path):
    status, calls = asked(tmp_path, PIP_LACKS=LOCAL)

    assert status == 2
    assert all(LOCAL in call for call in calls)


def test_with_a_gpu_the_stock_torch_is_taken(tmp_path: Path):
    _, calls = asked(tmp_path, gpu=True)

    assert calls[0].endswith("install --quiet torch==2.13.0")


def test_another_torch_is_taken_as_it_is_named(tmp_path: Path):
    _, calls = asked(tmp_path, TORCH="torch==2.12.0")

    assert calls[0].endswith("install --quiet torch==2.12.0")
