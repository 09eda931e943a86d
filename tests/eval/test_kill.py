"""An evaluation that is killed goes on from its file of answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_kill_midway_costs_what_was_being_computed_and_no_more(folder, tmp_path):
    cache, output = tmp_path / "cache.jsonl", tmp_path / "out.json"
    words = [sys.executable, "-m", "ossature", "eval", str(folder), "--tasks", "arithmetic"]
    words += ["--limit", "3000", "--batch-tokens", "256", "--cache", str(cache)]
    root = Path(__file__).parents[2]
    child = subprocess.Popen(words, cwd=root, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not cache.exists() or len(cache.read_bytes().splitlines()) < 20:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = cache.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 20 <= len(kept.splitlines()) < 3000
    subprocess.run([*words, "--output", str(output)], check=True, cwd=root, capture_output=True)
    whole = cache.read_bytes()
    assert whole.startswith(kept)
    keys = [json.loads(line)[0] for line in whole.splitlines()]
    assert len(keys) == len(set(keys))  # nothing was asked twice
    resumed = json.loads(output.read_text())["tasks"]
    fresh = [*words[: words.index("--cache")], "--output", str(output)]
    subprocess.run(fresh, check=True, cwd=root, capture_output=True)
    assert json.loads(output.read_text())["tasks"] == resumed
