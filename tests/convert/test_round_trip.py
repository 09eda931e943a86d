"""verify --round-trip on several ranks: all equal to the bit, or status 1 and a name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ossature.convert import verify
from tests.convert import on_ranks
from tests.convert.folders import assert_same_bits, convert, edit, weights
from tests.golden import ROOT
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def odd(mxfp4: Path) -> Path:
    """Blocks whose largest code is not 4 or 6: quantising them anew takes another scale."""
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    blocks = weights(mxfp4)[name] & 0x33
    return edit(mxfp4, mxfp4.parent / "odd_blocks", **{name: blocks})


def axes(text: str) -> list[str]:
    return [f"--parallel.{word}" for word in text.split()]


EQUAL = "71 tensors, all equal to the bit after a round trip over"


def test_two_ranks_give_back_every_bit(odd: Path, tmp_path: Path):
    command = [str(odd), "--round-trip", "--output", str(tmp_path / "back"), *axes("tp=2")]
    first, second = run_ranks(2, on_ranks.run_verify, [command], "")

    ((status, out),) = first
    assert status == 0 and out.splitlines()[-1] == f"{EQUAL} 2 ranks"
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "blocks.*.moe.experts.gate_up_weight 8 x 64 x 64 mxfp4 4 equal" in lines
    assert second == [(0, "")]
    assert_same_bits(weights(tmp_path / "back"), weights(odd))
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def test_one_bit_on_one_rank_is_found(bf16: Path):
    name = "blocks.2.attention.q_proj.weight"
    command = [str(bf16), "--round-trip", *axes("pp=2")]
    (first, second) = run_ranks(2, on_ranks.run_verify, [command], name)

    assert first[0][0] == second[0][0] == 1
    lines = first[0][1].splitlines()
    assert lines[0].startswith(f"{name}: 1 numbers differ, by ")
    wrong = [line.split()[0] for line in lines if line.endswith("1 of 4 differ")]
    assert wrong == ["blocks.*.attention.q_proj.weight"]


@pytest.mark.slow
def test_four_ranks_give_back_every_bit_of_every_format(odd: Path, tmp_path: Path):
    folders = [convert(odd, tmp_path / to, to) for to in ("bf16", "openai", "native")]
    layouts = ["tp=2 pp=2", "ep=2", "", "tp=2 ep=2", "ep=4", "etp=2 dp_replicate=2", "pp=4"]
    commands = [
        [str(folder), "--round-trip", *axes(text)] for folder in [odd, *folders] for text in layouts
    ]
    first, *others = run_ranks(4, on_ranks.run_verify, commands, "", seconds=300)

    for command, (status, out) in zip(commands, first, strict=True):
        assert status == 0 and out.splitlines()[-1] == f"{EQUAL} 4 ranks", (command, out)
    assert others == [[(0, "")] * len(commands)] * 3


@pytest.mark.slow
def test_logits_are_compared_by_all_ranks(bf16: Path, mxfp4: Path, tmp_path: Path):
    same = convert(mxfp4, tmp_path / "same", "bf16")
    layouts = ["tp=2 cp=2", "pp=2 ep=2", "cp=2 pp=2"]
    pairs = [(str(mxfp4), str(same)), (str(bf16), str(same))]
    commands = [[*pair, "--logits", *axes(text)] for text in layouts for pair in pairs]
    first, *_ = run_ranks(4, on_ranks.run_verify, commands, "", seconds=200)

    for (status, out), equal in zip(first, [True, False] * len(layouts), strict=True):
        (line,) = [line for line in out.splitlines() if line.startswith("largest")]
        assert (status, float(line.split()[-1]) == 0) == (0 if equal else 1, equal)


@pytest.mark.slow
def test_the_command_under_torchrun(mxfp4: Path, tmp_path: Path):
    """As a user types it; a temporary folder is gone at the end."""
    words = f"-m torch.distributed.run --standalone --nproc-per-node 4 -m ossature verify {mxfp4}"
    command = [sys.executable, *words.split(), "--round-trip", *axes("tp=2 pp=2")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{EQUAL} 4 ranks"
    assert not list(tmp_path.glob("ossature-*"))


def test_mistakes_are_told_before_ranks_meet(bf16: Path):
    for words, said in [
        ([], "b is missing"),
        ([str(bf16), "--round-trip"], "--round-trip takes one checkpoint"),
        ([str(bf16), "--output", "x"], "--output goes with --round-trip"),
    ]:
        with pytest.raises(ValueError, match=said):
            verify.main([str(bf16), *words])
    with pytest.raises(ValueError, match=r"tp \(2\) must divide the number of ranks \(1\)"):
        verify.main([str(bf16), "--round-trip", "--parallel.tp", "2"])
