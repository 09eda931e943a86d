import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ossature.data import vocabulary
from ossature.data.build import build
from ossature.data.indexed import IndexedTokens
from ossature.data.tokenizer import Tokenizer, load
from tests.data.corpora import as_megatron_reads, loader, rows

SENTENCE = "the model reads a row of tokens and says which one is next <|end|>"
WORDS = [*SENTENCE.split(), "\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer(vocabulary.train([" ".join(WORDS)] * 9, 300), "toy").save(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 60, count)
    return [" ".join(generator.choice(WORDS, length)) for length in lengths]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    raw = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    return path


def command(*words) -> int:
    return build([str(word) for word in words])


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[Path]:
    """1.8 MB: a file that is cut into three parts, a compressed one, and two small texts."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "c.txt").write_text(" ".join(WORDS))
    (folder / "d.txt").write_text("last")
    return [
        write_jsonl(folder / "a.jsonl", texts(9000)),
        write_jsonl(folder / "b.jsonl.gz", texts(900, seed=1)),
        folder / "c.txt",
        folder / "d.txt",
    ]


@pytest.fixture(scope="module")
def built(inputs, tokenizer, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "data"
    words = ("--output", output, "--tokenizer", tokenizer, "--split", "90,8,2", "--workers", "1")
    assert command(*inputs, *words) == 0
    return output


def test_the_folder_holds_every_document_in_order_with_its_end(built, tokenizer):
    encode = load(tokenizer)
    written = [*texts(9000), *texts(900, seed=1), " ".join(WORDS), "last"]
    expected = [[*encode.encode(text), encode.end_of_document] for text in written if text]
    manifest = json.loads((built / "manifest.json").read_text())
    found = []
    for split in ("train", "validation", "test"):
        file = IndexedTokens(built / f"{split}_text_document")
        numbers = manifest["splits"][split]
        assert (file.num_documents, file.num_tokens) == (numbers["documents"], numbers["tokens"])
        borders = [file.document_start(n) for n in range(file.num_documents + 1)]
        found += [file.tokens(start, stop).tolist() for start, stop in pairwise(borders)]

    assert found == expected
    splits = [as_megatron_reads(built / f"{split}_text_document") for split in manifest["splits"]]
    assert [document for split in splits for document in split] == expected
    assert manifest["empty_documents"] == len(written) - len(expected) > 0
    shares = [manifest["splits"][split]["documents"] for split in ("train", "validation", "test")]
    assert shares == [round(len(expected) * n) - round(len(expected) * m)
                      for m, n in ((0, 0.9), (0.9, 0.98), (0.98, 1))]  # fmt: skip


def test_the_manifest_tells_tokenizer_and_sources(built, inputs, tokenizer):
    manifest = json.loads((built / "manifest.json").read_text())

    assert manifest["tokenizer"]["sha256"] == load(tokenizer).sha256() == load(built).sha256()
    assert manifest["tokenizer"]["end_of_document"] == load(built).end_of_document
    assert [source["path"] for source in manifest["sources"]] == [str(path) for path in inputs]
    for source, path in zip(manifest["sources"], inputs, strict=True):
        assert source["bytes"] == path.stat().st_size
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for split, numbers in manifest["splits"].items():
        raw = (built / f"{split}_text_document.bin").read_bytes()
        assert numbers["bin_sha256"] == hashlib.sha256(raw).hexdigest()


def test_the_number_of_workers_changes_no_byte(built, inputs, tokenizer, tmp_path):
    for workers in (2, 3):
        words = ("--output", tmp_path / str(workers), "--tokenizer", tokenizer)
        command(*inputs, *words, "--split", "90,8,2", "--workers", workers)
        assert content(tmp_path / str(workers)) == content(built)


def test_what_is_built_is_loaded(built):
    train = loader(built, seq_len=32, vocab_size=300)
    seen = [token for row in rows(train, range(3)) for token in row]

    assert max(seen) < 300
    assert load(built).end_of_document in seen


def build_process(*words) -> subprocess.Popen:
    program = (
        "import sys\nfrom ossature.data.build import build\n"
        "if __name__ == '__main__':\n    sys.exit(build(sys.argv[1:]))"
    )
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)])


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_it_gives_the_same_bytes(tokenizer, tmp_path, capsys, workers):
    source = write_jsonl(tmp_path / "a.jsonl", texts(30_000))  # 11 parts
    options = ("--tokenizer", tokenizer, "--workers", workers)
    output = tmp_path / "data"
    process = build_process(source, "--output", output, *options)
    parts = tmp_path / "data.partial/parts"
    end = time.monotonic() + 60
    while len(done := list(parts.glob("*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    # One of the finished parts was spoilt after the kill: it is made again, the other is kept.
    spoilt = done[0].with_suffix(".bin")
    raw = bytearray(spoilt.read_bytes())
    raw[100] ^= 1
    spoilt.write_bytes(raw)
    capsys.readouterr()
    command(source, "--output", output, *options)

    assert "tokens found from an earlier start" in capsys.readouterr().out
    command(source, "--output", tmp_path / "whole", *options)
    assert content(output) == content(tmp_path / "whole")
    assert not (tmp_path / "data.partial").exists()


def test_a_part_of_changed_input_is_not_kept(tokenizer, tmp_path, capsys):
    good = write_jsonl(tmp_path / "a.jsonl", texts(50))
    bad = write_jsonl(tmp_path / "b.jsonl", ["fine"])
    bad.write_bytes(bad.read_bytes() + b"{}\n")
    words = (good, bad, "--output", tmp_path / "data", "--tokenizer", tokenizer, "--workers", 1)
    with pytest.raises(ValueError, match=r"b\.jsonl: line 2: no key"):
        command(*words)
    write_jsonl(bad, ["mended", "now"])
    capsys.readouterr()
    command(*words)
    total = json.loads((tmp_path / "data/manifest.json").read_text())["splits"]["train"]["tokens"]
    out = capsys.readouterr().out

    assert "found from an earlier start" in out
    found = int(out.split(" tokens found")[0].split("\n")[-1].replace(",", ""))
    assert 0 < found < total


def test_a_worker_that_fails_stops_the_build_and_names_the_file(tokenizer, tmp_path):
    for n in range(6):
        write_jsonl(tmp_path / f"{n}.jsonl", texts(20, seed=n))
    (tmp_path / "4.jsonl").write_bytes(b'{"text": "a"}\nnot json\n')

    with pytest.raises(ValueError, match=r"4\.jsonl: line 2: not JSON"):
        command(tmp_path, "--output", tmp_path / "out", "--tokenizer", tokenizer, "--workers", 2)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_trained_on_the_input_is_stored_with_it(tmp_path, inputs):
    command(*inputs, "--output", tmp_path / "a", "--train-tokenizer", 300, "--workers", 1)
    command(*inputs, "--output", tmp_path / "b", "--train-tokenizer", 300, "--workers", 2)

    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert json.loads((tmp_path / "a/manifest.json").read_text())["tokenizer"]["name"] == "trained"
    assert 266 < load(tmp_path / "a").vocab_size <= 300


def test_output_that_is_there_is_refused_before_any_work(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()

    with pytest.raises(ValueError, match="out: exists and is not an empty folder"):
        command("python-stdlib", "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give at least one input|inputs is missing"),
        (("python-stdlib", "--split", "x"), "must have one to three numbers"),
        (("python-stdlib", "--train-tokenizer", "400", "--tokenizer", "a"), "not both"),
        (("python-stdlib", "--workers", "-1"), "at least 0"),
        (("missing.jsonl", "--train-tokenizer", "400"), "missing.jsonl: no such file or folder"),
        (("python-stdlib", "--train-tokenizer", "10"), "must be at least 266"),
        (("python-stdlib", "--tokenizer", "missing/folder/x"), "no such file or folder"),
    ],
)
def test_options_without_sense_are_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(*words, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_second_build_of_the_same_output_is_refused(tokenizer, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is at work"):
            command("python-stdlib", "--output", tmp_path / "out", "--tokenizer", tokenizer)


def test_the_help_imports_nothing_heavy():
    program = (
        "import sys, contextlib\nfrom ossature.data.build import build\n"
        "with contextlib.suppress(SystemExit): build(['--help'])\n"
        "assert not {'torch', 'tokenizers', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, env=os.environ
    )
