"""convert, verify and info as a user meets them, and what an interrupted one leaves behind."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from ossature import cli
from ossature.convert import destination, folder
from ossature.convert.command import describe, size_bytes
from ossature.convert.destination import new_folder
from ossature.convert.transfer import Error, Report
from tests.convert.folders import assert_same_bits, convert, edit, weights
from tests.golden import ROOT


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_convert_says_what_it_did(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("convert", bf16, tmp_path / "out", "--to", "mxfp4") == 0
    out = capsys.readouterr().out.splitlines()

    assert out[0] == f"{bf16}: Hugging Face, bfloat16 -> Hugging Face, MXFP4"
    assert out[1] == "experts quantised to MXFP4: 0 of 8 matrices exact to the bit"
    assert out[2].startswith("quantisation error of the others: 1")
    assert out[3].startswith(f"{tmp_path / 'out'}: 0.00 GB in ")


def test_convert_keeps_the_scales_of_a_source(bf16, mxfp4, tmp_path: Path):
    once = convert(mxfp4, tmp_path / "once", "bf16")
    words = ("--to", "mxfp4", "--source", mxfp4, "--max-shard-size", "30KB")
    assert run("convert", once, tmp_path / "out", *words) == 0

    assert_same_bits(weights(tmp_path / "out"), weights(mxfp4))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_the_error_is_that_of_all_matrices_together():
    errors = {"a": Error(3.0, 100.0, 0.5), "b": Error(1.0, 300.0, 0.25)}
    lines = describe(Report(recoded=5, inexact=errors, cast={"float32": 7}))

    assert lines == [
        "7 tensors rounded from float32 to bfloat16",
        "experts quantised to MXFP4: 3 of 5 matrices exact to the bit",
        "quantisation error of the others: 10.00% of their norm, at most 0.5 in a number; "
        "worst a: 17.32%",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("4.5GiB", 4_831_838_208), ("7", 7),
     ("2 kb", 2000), ("1TB", 10**12)],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(text: str, size: int):
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "five", "-5GB", "5 parsecs", "GB"])
def test_other_sizes_are_refused(text: str):
    with pytest.raises(ValueError, match="is no size"):
        size_bytes(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1"])
def test_a_size_of_nothing_is_refused(text: str):
    with pytest.raises(ValueError, match="holds no tensor; it must be at least 1 byte"):
        size_bytes(text)


def test_verify_is_content_with_the_same_weights_in_any_format(
    mxfp4: Path, openai: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    once, native = (convert(mxfp4, tmp_path / to, to) for to in ("bf16", "native"))
    for a, b in [(once, mxfp4), (mxfp4, openai), (native, mxfp4), (openai, native)]:
        assert run("verify", a, b) == 0, (a, b)
        assert capsys.readouterr().out == "71 tensors, all equal to the bit\n"
    assert run("verify", once, openai, "--logits") == 0
    assert "largest difference of a logit: 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("place", [(0, 0), (7, 3)])
def test_verify_finds_one_bit(place, bf16: Path, tmp_path: Path, capsys):
    name = "model.layers.3.mlp.router.weight"
    changed = weights(bf16)[name].clone()
    changed.view(torch.int16)[place] ^= 1
    other = edit(bf16, tmp_path / "other", **{name: changed})

    assert run("verify", bf16, other) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("blocks.3.moe.router.weight: 1 numbers differ, by ")
    assert last == f"{bf16} and {other} differ"


def test_verify_tells_the_zeros_apart_and_sees_nan(bf16: Path, tmp_path: Path, capsys):
    name = "model.layers.3.self_attn.sinks"
    zero, minus, nan = (torch.full((6,), v, dtype=torch.bfloat16) for v in (0.0, -0.0, torch.nan))
    folders = [edit(bf16, tmp_path / str(n), **{name: t}) for n, t in enumerate((zero, minus, nan))]

    assert run("verify", folders[0], folders[1]) == 1
    assert "6 numbers differ, by 0 at most" in capsys.readouterr().out
    assert run("verify", folders[0], folders[2]) == 1
    assert "6 numbers differ, by inf at most" in capsys.readouterr().out
    assert run("verify", folders[2], folders[2]) == 0


def test_verify_shows_the_largest_error_of_each_tensor(bf16: Path, mxfp4: Path, capsys):
    assert run("verify", bf16, mxfp4) == 1
    lines = capsys.readouterr().out.splitlines()

    assert sum("_weight: " in line and "numbers differ, by " in line for line in lines) == 8
    a, b = folder.open_source(bf16), folder.open_source(mxfp4)
    name = "blocks.0.moe.experts.down_weight"
    largest = (a.read(name).float() - b.read(name).float()).abs().max().item()
    assert any(line.startswith(name) and f"by {largest:.4g} at most" in line for line in lines)


def test_verify_names_what_is_in_one_only_and_what_the_configs_say(
    bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from tests.convert.folders import theirs

    theirs(tmp_path / "short", num_hidden_layers=3, sliding_window=6)
    assert run("verify", bf16, tmp_path / "short", "--logits") == 1
    out = capsys.readouterr().out
    assert "config.json: sliding_window: 7 and 6\n" in out
    assert f"blocks.3.moe_norm.weight: only in {bf16}\n" in out
    assert run("verify", tmp_path / "short", bf16) == 1
    assert f"blocks.3.moe_norm.weight: only in {bf16}\n" in capsys.readouterr().out


def test_verify_sees_another_end_of_texts(bf16: Path, tmp_path: Path, capsys):
    """No number hangs on it, and every answer does."""
    other = tmp_path / "other"
    shutil.copytree(bf16, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    first = tmp_path / "first"
    shutil.copytree(bf16, first)
    (first / "config.json").write_text(json.dumps({**config, "eos_token_id": 4}))
    assert run("verify", first, other) == 1
    assert "config.json: eos_token_id: 4 and 5" in capsys.readouterr().out


def test_verify_tells_other_bytes_from_other_numbers(mxfp4: Path, tmp_path: Path, capsys):
    names = [f"model.layers.0.mlp.experts.down_proj_{end}" for end in ("blocks", "scales")]
    state = weights(mxfp4)
    blocks, scales = (state[name].clone() for name in names)
    blocks[0, 0, 0] = 0x11  # 0.5 throughout
    scales[0, 0, 0] = 128
    half = edit(mxfp4, tmp_path / "half", **dict(zip(names, (blocks, scales), strict=True)))
    blocks, scales = blocks.clone(), scales.clone()
    blocks[0, 0, 0] = 0x22  # 1.0 throughout, at half the scale
    scales[0, 0, 0] = 127
    one = edit(mxfp4, tmp_path / "one", **dict(zip(names, (blocks, scales), strict=True)))

    assert run("verify", half, one) == 0
    assert "1 tensors hold the same numbers coded in other bytes" in capsys.readouterr().out
    assert run("verify", half, one, "--bytes") == 1


def test_info_says_what_a_folder_holds(mxfp4: Path, capsys: pytest.CaptureFixture[str]):
    assert run("info", mxfp4) == 0
    out = capsys.readouterr().out
    parameters = sum(t.numel() for t in weights(convert_once(mxfp4)).values())

    assert "Hugging Face, MXFP4" in out
    assert "weights     71: 8 MXFP4, 63 bfloat16" in out
    assert f"parameters  {parameters:,} (" in out
    assert "sliding_window          7" in out
    assert "odd         no tokenizer.json" in out


def convert_once(source: Path) -> Path:
    target = source.parent / "for_info"
    return target if target.exists() else convert(source, target, "bf16")


def test_info_says_what_is_odd(bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from tests.convert.folders import edit_config

    name = "model.norm.weight"
    odd = edit(bf16, tmp_path / "odd", **{name: weights(bf16)[name].float()})
    edit_config(
        odd,
        architectures=["FSDPGptOssForCausalLM"],
        quantization_config={"quant_method": "mxfp4"},
        dtype="float32",
        rms_norm_eps=1e-6,
    )
    assert run("info", odd) == 0
    out = capsys.readouterr().out

    assert "has a quantization_config, the weights are not quantised" in out
    assert "architectures is ['FSDPGptOssForCausalLM']" in out
    assert "config.json says float32, most weights are bfloat16" in out
    assert "weights of several dtypes: bfloat16, float32" in out
    assert "rms_norm_eps is 1e-06; 1e-05 as published" in out


# Mistakes are one line and status 2; nothing is left under the final name.


def mistake(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()  # what came before
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_full_folder_is_refused_before_work_begins(bf16: Path, tmp_path: Path, capsys):
    (tmp_path / "note.txt").touch()

    assert "is not empty" in mistake(capsys, "convert", bf16, tmp_path, "--to", "bf16")
    file = tmp_path / "note.txt"
    assert "is in the way" in mistake(capsys, "convert", bf16, file, "--to", "bf16")
    assert list(tmp_path.iterdir()) == [file]


def test_scales_are_kept_only_where_there_are_any(bf16: Path, mxfp4: Path, tmp_path: Path, capsys):
    words = ("convert", bf16, tmp_path / "out", "--to")
    assert "source must be in MXFP4" in mistake(capsys, *words, "mxfp4", "--source", bf16)
    assert "--to bf16 has no scales" in mistake(capsys, *words, "bf16", "--source", mxfp4)
    assert "is no size" in mistake(capsys, *words, "bf16", "--max-shard-size", "big")
    assert "to is missing" in mistake(capsys, *words[:-1])
    assert not (tmp_path / "out").exists()


def test_scales_of_another_model_are_refused(bf16: Path, tmp_path: Path, capsys):
    from tests.convert.folders import theirs

    theirs(tmp_path / "square", "square")
    other = convert(tmp_path / "square", tmp_path / "other", "mxfp4")
    words = ("convert", bf16, tmp_path / "out", "--to", "mxfp4", "--source", other)
    assert "embedding.weight has shape (64, 64), (96, 64) in" in mistake(capsys, *words)


def test_a_damaged_folder_is_one_line_for_every_command(bf16: Path, tmp_path: Path, capsys):
    bad = edit(bf16, tmp_path / "bad", **{"lm_head.weight": None, "head.weight": torch.zeros(2)})
    for words in (("info", bad), ("verify", bf16, bad), ("convert", bad, tmp_path / "out",
                  "--to", "bf16")):  # fmt: skip
        line = mistake(capsys, *words)
        assert line == f"error: {bad}: no row in the table of names for head.weight\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["bf16", "mxfp4", "openai", "native"])
def test_a_full_disk_leaves_nothing(to: str, bf16: Path, tmp_path: Path, capsys, monkeypatch):
    writes = 0
    pwrite = os.pwrite

    def full(handle: int, data: memoryview, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    if to == "native":  # written by torch, which makes another error of it
        monkeypatch.setattr(
            FileSystem, "create_stream", lambda _self, path, _mode: FullStream(path, "w")
        )
    line = mistake(capsys, "convert", bf16, tmp_path / "out", "--to", to)
    assert line == f"error: {tmp_path / 'out'}: No space left on device\n"
    assert not list(tmp_path.iterdir())


class FullStream(io.FileIO):
    """A file on a disk with room for 100 bytes."""

    def write(self, data) -> int:
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_too_little_room_is_found_before_work_begins(bf16: Path, tmp_path: Path, capsys):
    def little(_):
        return type("Usage", (), {"free": 1000})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destination.shutil, "disk_usage", little)
        line = mistake(capsys, "convert", bf16, tmp_path / "out", "--to", "bf16")
    assert ", the disk has 0.0 MB left" in line and "needs 0.0 MB" not in line
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_under_its_name_when_all_is_in_it(tmp_path: Path):
    with new_folder(tmp_path / "deep" / "out") as partial:
        (partial / "file").write_text("x")
        assert partial.parent == tmp_path / "deep"
        assert not (tmp_path / "deep" / "out").exists()
    assert [f.name for f in (tmp_path / "deep" / "out").iterdir()] == ["file"]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_was_not_finished_is_gone(error: type[BaseException], tmp_path: Path):
    with pytest.raises(error), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


SLOW = """
import sys, time
from ossature import cli
from ossature.checkpoint.safetensors import Writer
write = Writer.write
def slow(self, *arguments):
    write(self, *arguments)
    print("written", file=sys.stderr, flush=True)
    time.sleep(0.5)
Writer.write = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
def test_an_interrupt_leaves_nothing_under_the_final_name(number, status, bf16, tmp_path: Path):
    """A process that is killed outright cannot clean up; it leaves another name."""
    command = [sys.executable, "-c", SLOW, "convert", bf16, tmp_path / "out", "--to", "mxfp4"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        while "written" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        started = time.monotonic()
        process.wait(timeout=20)
    left = {path.name for path in tmp_path.iterdir()}

    assert process.returncode == status
    assert left == ({f"out.partial-{process.pid}"} if number == signal.SIGKILL else set())
    assert time.monotonic() - started < 15
