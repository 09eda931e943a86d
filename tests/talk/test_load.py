"""200 clients at once, an overload, clients that leave, and SIGTERM, on a real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import ROOT


@pytest.mark.slow
def test_under_load_nothing_is_lost_and_memory_is_bounded(tmp_path: Path):
    file = tmp_path / "found.json"
    script = ROOT / "benchmarks" / "serve.py"
    words = ["--requests", "200", "--tokens", "16", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, script, *words], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())

    assert [row["lost"] for row in found.values()] == [0] * 5
    assert found["at once"]["answered"] == found["again"]["answered"] == 200
    assert found["overload"]["answered"] == 200  # each came back until it was let in
    assert (found["gone"]["answered"], found["gone"]["gone"]) == (100, 100)
    assert found["again"]["peak_mib"] < 1.1 * found["at once"]["peak_mib"]
    ended = found["TERM"]
    assert ended["status"] == 0 and ended["answered"] + ended["refused"] == 200
    assert ended["server_says"] == f"answered {ended['answered']} requests, left 0"
