"""The command: its table, its file, its cache, and what it refuses."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ossature.cli import main
from ossature.convert.base import Base, identity
from ossature.eval.subject import Subject, weights_fingerprint


def test_a_table_a_file_and_answers_that_are_not_asked_twice(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"question": "the door", "answer": "x"}\n')
    output, cache = tmp_path / "a.json", tmp_path / "cache.jsonl"
    argv = ["eval", str(folder), "--tasks", "arithmetic", str(tmp_path / "q.jsonl"), "--limit", "5"]
    argv += ["--max-new-tokens", "4", "--output", str(output), "--cache", str(cache)]
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert table.startswith("task") and "arithmetic" in table and "q.jsonl" in table
    made = json.loads(output.read_text())
    assert made["tasks"]["arithmetic"]["metrics"]["accuracy"]["count"] == 5
    assert made["settings"]["limit"] == 5
    assert len(cache.read_text().splitlines()) == 1 + 5 + 1

    def never(*_):
        raise AssertionError("asked again")

    monkeypatch.setattr(Subject, "_sample", never)
    monkeypatch.setattr("ossature.eval.likelihood._run", never)
    assert main(argv) == 0
    assert capsys.readouterr().out == table
    assert json.loads(output.read_text()) == made
    assert main(["eval", "--compare", str(output), str(output)]) == 0
    assert "+0.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "eval: no task; give --tasks NAME ..."),
        (["--tasks", "arithmetic", "--samples", "4"], "samples (4) need a temperature above 0"),
        (["--tasks", "arithmetic", "--output", "/nowhere/x.json"], "no such folder: /nowhere"),
        (["--tasks", "arithmetic", "--output", "."], "error: .: is a folder; give a file"),
        (["--tasks", "bits_per_byte"], "no such file or folder: bits_per_byte:PATH"),
        (["--tasks", "arithmetic", "--plot", "x.svg"], "plot (x.svg) needs the task needle"),
        (["--tasks", "arithmetic", "--batch", "0"], "batch (0) must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, argv, message):
    assert main(["eval", str(folder), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_compare_takes_two_files(capsys):
    assert main(["eval", "--compare", "a.json"]) == 2
    assert "compare: give two files of results, not 1" in capsys.readouterr().err


def test_results_are_written_though_nobody_reads_the_table(folder, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "ossature", "eval", str(folder), "--tasks", "arithmetic"]
    words += ["--limit", "1", "--output", str(tmp_path / "x.json")]
    root = Path(__file__).parents[2]
    subprocess.run(words, stdout=writer, stderr=subprocess.DEVNULL, cwd=root, timeout=60)
    os.close(writer)
    assert "arithmetic" in json.loads((tmp_path / "x.json").read_text())["tasks"]


def test_answers_of_one_gguf_file_are_not_anothers(folder, tmp_path):
    """A file has no files in it that could tell it from others."""
    one, other = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.write_bytes(b"1")
    other.write_bytes(b"22")
    assert len({weights_fingerprint(path) for path in (one, other, folder)}) == 3


def test_an_adapter_of_another_base_is_asked_and_said(folder, tmp_path, capsys, monkeypatch):
    """Shapes cannot tell, and its answers would be taken for the adapter's."""
    base = Base("elsewhere", "0" * 32, 0, False, False)
    monkeypatch.setattr("ossature.eval.subject.load_adapter", lambda *_: SimpleNamespace(folder=1))
    for found, warned in ((base, True), (replace(base, identity=identity(folder)), False)):
        monkeypatch.setattr("ossature.eval.subject.read_base", lambda _, found=found: found)
        argv = ["eval", str(folder), "--tasks", "arithmetic", "--limit", "1"]
        assert main([*argv, "--adapter", str(tmp_path)]) == 0
        said = capsys.readouterr().err
        assert ("was trained on elsewhere, and the weights in" in said) == warned
