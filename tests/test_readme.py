"""What the README says is true: its tree, its commands with every option, its links, its code."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ossature
from ossature.cli import VERBS
from tests.golden import ROOT
from tests.tiny import hugging_face_model, ours

README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command line of the README's shell blocks, as words."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_tree_is_the_files():
    """Every module with its own first sentence; `make tree` draws it anew."""
    tree = runpy.run_path(str(ROOT / "scripts" / "tree.py"))

    assert tree["with_tree"](README) == README
    folders = {path.parent.name for path in (ROOT / "ossature").glob("*/__init__.py")}
    assert set(tree["FOLDERS"]) == folders


def test_no_module_has_more_than_500_lines():
    for path in (ROOT / "ossature").rglob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 500, path


def test_every_command_is_shown():
    shown = {" ".join(words) for words in commands()}

    for verb in VERBS:
        assert any(f"ossature {verb} " in line for line in shown), verb


def launched(words: list[str]) -> list[list[str]]:
    """`ossature launch ... COMMAND ...` is two commands."""
    if words[1] != "launch":
        return [words]
    inner = next(n for n, word in enumerate(words[2:], 2) if word in {v.split()[0] for v in VERBS})
    return [words[:inner], ["ossature", *words[inner:]]]


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_shown_with_a_command_is_one_of_its_options(verb: str):
    lines = [words[words.index("ossature") :] for words in commands() if "ossature" in words]
    lines = [part for words in lines for part in launched(words)]
    lines = [words for words in lines if words[1 : 1 + len(verb.split())] == verb.split()]
    options = {word.partition("=")[0] for words in lines for word in words if word[:2] == "--"}

    done = subprocess.run(
        [sys.executable, "-m", "ossature", *verb.split(), "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    known = set(re.findall(r"--[a-z][a-z0-9_.-]*", done.stdout))
    assert options <= known, options - known


def test_every_make_target_and_script_exists():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for words in commands():
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, words
        for word in words:
            if word.endswith((".toml", ".sh")):
                assert (ROOT / word).is_file(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ossature.save_model(ours(hugging_face_model()), "runs/export")
    names: dict[str, object] = {"ossature": ossature}

    for program in blocks("python"):
        exec(compile(program, "README.md", "exec"), names)

    logits, out = names["logits"], names["out"]
    assert isinstance(logits, torch.Tensor) and logits.shape == (1, 5, 96)
    assert isinstance(out, torch.Tensor) and out.shape == (1, 21)
    assert Path("runs/copy/config.json").is_file()
    assert Path("runs/again/config.json").is_file()
