"""`ossature sample` from the outside, on a tiny model with a tokenizer of bytes."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

import ossature
from ossature.cli import main
from ossature.data.tokenizer import Tokenizer
from ossature.sample.command import Printer, stop_ids
from tests.tiny import hugging_face_model, ours

ENDS = ("<|endoftext|>", "<|return|>", "<|call|>")


def byte_tokenizer() -> Tokenizer:
    """256 tokens of a byte each, then three special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(end, special=True) for end in ENDS])
    return Tokenizer(inner, "bytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model that knows no end of its own, and its tokenizer."""
    path = tmp_path_factory.mktemp("sample") / "model"
    theirs = hugging_face_model(vocab_size=259, seed=2, eos_token_id=None, pad_token_id=None)
    ossature.save_model(ours(theirs), path)
    byte_tokenizer().save(path)
    return path


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    """What transformers' loop over the folder's model would print."""
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(prompt)])
    model.generation_config.eos_token_id = sorted(tokenizer.special.values())
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode([n for n in out.tolist() if n not in tokenizer.special.values()])


def test_prompts_are_printed_one_below_the_other_each_with_its_continuation(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--prompt", "def f(x):", "é", "--prompt", "a much longer prompt than the others"]
    assert (
        main(["sample", str(folder), *words, "--temperature", "0", "--max-new-tokens", "20"]) == 0
    )

    expected = [greedy(folder, prompt, 20) for prompt in (words[1], words[2], words[4])]
    assert capsys.readouterr().out == "\n\n".join(expected) + "\n"


def test_a_seed_gives_the_same_text_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    texts = []
    for seed in ("1", "1", "2"):
        words = ["--prompt", "def", "--seed", seed, "--top-p", "0.9", "--top-k", "50"]
        assert main(["sample", str(folder), *words]) == 0
        texts.append(capsys.readouterr().out)

    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_text(folder: Path, capsys: pytest.CaptureFixture[str]):
    whole = greedy(folder, "def", 30)
    stop = whole[12:14]
    words = ["--prompt", "def", "--temperature", "0", "--max-new-tokens", "30", "--stop", stop]

    assert main(["sample", str(folder), *words]) == 0

    assert capsys.readouterr().out == whole[: whole.index(stop, 3)] + "\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no prompt"),
        (["--prompt", ""], "empty --prompt"),
        (["--prompt", "a", "--top-p", "2"], "top_p (2.0) must be between 0 and 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature (-1.0) must be 0 or more"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens (0) must be 1 or more"),
        (["--prompt", "a", "--batch", "0"], "batch (0) must be 1 or more"),
        (["--prompt", "a", "--regex", "a", "--json-schema", "b"], "exclude each other"),
        (["--prompt", "a\udcff"], "no Unicode text: 'a\\udcff'"),
        (["--prompt", "a", "--regex", "("], "not a regex that can be followed"),
        (["--promt", "a"], "did you mean prompt"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["sample", str(folder), *words]) == 2

    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert line in errors


def test_a_folder_without_a_tokenizer_says_how_to_give_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ossature.save_model(ossature.load_model(folder), tmp_path / "bare")
    words = ["sample", str(tmp_path / "bare"), "--prompt", "a", "--max-new-tokens", "1"]

    assert main(words) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(folder)]) == 0


def test_a_tokenizer_of_another_model_is_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ossature.save_model(ours(hugging_face_model()), tmp_path / "small")
    words = ["sample", str(tmp_path / "small"), "--prompt", "ÿ", "--tokenizer", str(folder)]

    assert main(words) == 2
    assert "not in the model's vocabulary of 96" in capsys.readouterr().err


def test_harmony_text_ends_at_return_endoftext_and_call():
    """Also with a config and a generation config of before `<|call|>` was one."""
    special = {"<|endoftext|>": 199_999, "<|return|>": 200_002, "<|call|>": 200_012,
               "<|message|>": 200_008}  # fmt: skip

    assert stop_ids(special, 200_002) == {200_002, 199_999, 200_012}
    assert stop_ids({"<|endoftext|>": 7}, None) == {7}
    assert stop_ids({"<|endoftext|>": 7}, 3) == {3, 7}


def test_the_first_unfinished_row_is_shown_live(capsys: pytest.CaptureFixture[str]):
    def shown() -> str:
        return capsys.readouterr().out

    printer = Printer(["A:", "B:", "C:"])
    assert shown() == "A:"
    for row, text in enumerate("ax1"):
        printer.take(row, text, ended=False)
    assert shown() == "a"
    printer.take(0, "b", ended=False)
    printer.take(1, "y", ended=True)
    printer.take(2, "2", ended=False)
    assert shown() == "b"
    printer.take(0, "", ended=True)
    printer.take(2, "3", ended=False)
    assert shown() == "\n\nB:xy\n\nC:123"
    printer.take(2, "4", ended=True)
    assert shown() == "4\n"


def test_a_regular_expression_holds_for_every_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("llguidance")
    words = ["--prompt", "a", "bb", "--regex", "[0-9]{3}-(yes|no)", "--temperature", "1.5"]

    assert main(["sample", str(folder), *words]) == 0

    first, second = capsys.readouterr().out.split("\n\n")
    assert re.fullmatch("a[0-9]{3}-(yes|no)", first)
    assert re.fullmatch("bb[0-9]{3}-(yes|no)\n", second)


def test_what_a_model_writes_drives_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    printer = Printer(["A\x1b", "B"])
    printer.take(1, "\x9b1;\tx", ended=True)
    printer.take(0, "\x1b[2J", ended=True)

    assert capsys.readouterr().out == "A\\x1b\\x1b[2J\n\nB\\x9b1;\tx\n"


def test_a_text_that_fails_is_told_and_the_others_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = ossature.load_model(folder)
    (token,) = byte_tokenizer().encode("X")
    with torch.no_grad():
        model.embedding.weight[token] = torch.nan
    ossature.save_model(model, tmp_path / "broken")
    byte_tokenizer().save(tmp_path / "broken")
    words = ["sample", str(tmp_path / "broken"), "--prompt", "aX", "b", "--max-new-tokens", "3"]

    assert main([*words, "--temperature", "0"]) == 1
    found = capsys.readouterr()
    assert found.err == "error: prompt 1: the model's logits are not numbers\n"
    assert found.out.startswith("aX\n\nb") and len(found.out) > 6


def test_what_the_output_cannot_show_is_spelled_out(folder: Path, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["sample", str(folder), "--prompt", "é", "--max-new-tokens", "1"]) == 0
    assert sys.stdout.buffer.getvalue().startswith(rb"\xe9")  # type: ignore[attr-defined]


def test_a_json_schema_is_read_from_a_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["left", "right"]}))
    words = ["--prompt", "go ", "--json-schema", str(tmp_path / "schema.json")]

    assert main(["sample", str(folder), *words]) == 0
    assert capsys.readouterr().out in ('go "left"\n', 'go "right"\n')

    assert main(["sample", str(folder), *words[:3], str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_what_each_prompt_says_does_not_depend_on_how_many_run_at_a_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--prompt", "one", "two two", "three", "--max-new-tokens", "9", "--top-p", "0.9"]
    words += ["--min-p", "0.01", "--repetition-penalty", "1.2", "--presence-penalty", "0.5"]
    shown = []
    for batch in ("1", "2", "8"):
        assert main(["sample", str(folder), *words, "--batch", batch]) == 0
        shown.append(capsys.readouterr().out)

    assert shown[0] == shown[1] == shown[2]
