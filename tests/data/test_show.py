import json
import os
import pty
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from subprocess import Popen

import pytest

from ossature.data.show import main
from tests.data.chats import data_chat, small_tokenizer, write_records
from tests.data.corpora import write_documents

CHAT = {
    "messages": [
        {"role": "user", "content": "what is one"},
        {"role": "assistant", "thinking": "it", "content": "so"},
    ]
}
LEARNT = "⟦<|channel|>analysis<|message|>it<|end|><|start|>assistant<|channel|>final<|message|>so"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("show")
    records = [CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}]
    source = write_records(root / "in.jsonl", records)
    tokenizer = small_tokenizer(root / "tokenizer")
    data_chat(source, "--output", root / "data", "--tokenizer", tokenizer, "--seq-len", 512,
              "--split", "1", "--workers", 1)  # fmt: skip
    return root / "data"


def shown(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_learnt_text_stands_in_brackets_and_borders_are_marked(folder, capsys):
    out = shown(capsys, folder, "--index", 0)
    first, second = out.split("── document ")[1:]

    assert (
        f"<|start|>user<|message|>what is one<|end|><|start|>assistant{LEARNT}<|return|>⟧" in first
    )
    assert "⟦<|channel|>final<|message|>so<|end|>⟧<|start|>user" in second
    assert f"{LEARNT}<|return|>⟧" in second
    assert out.startswith(f"{folder}: train row 0 of 1\n")
    numbers = json.loads((folder / "manifest.json").read_text())["splits"]["train"]
    end = f"── {512 - numbers['tokens']} tokens of padding; {numbers['tokens']} tokens, "
    assert end + f"{numbers['learnt_tokens']} learnt" in out


def test_what_a_terminal_would_obey_is_spelled_out(folder, tmp_path, capsys):
    """A text that clears the line, turns the direction of writing, or hides: none of it happens."""
    hostile = "a\x1b[2K\rb\x9b1A\u202ec\ufeff\x07d\u3000e\tf\ng"
    record = {
        "messages": [{"role": "user", "content": hostile}, {"role": "assistant", "content": "\x08"}]
    }
    source = write_records(tmp_path / "in.jsonl", [record])
    words = ("--tokenizer", folder, "--seq-len", 512, "--split", "1", "--workers", 1)
    data_chat(source, "--output", tmp_path / "data", *words)
    out = shown(capsys, tmp_path / "data")
    assert r"a\x1b[2K\rb\x9b1A\u202ec\ufeff\x07d" + "\u3000e\tf\ng<|end|>" in out
    assert r"<|message|>\x08<|return|>⟧" in out
    assert not set(out) & set("\x1b\r\x9b\u202e\ufeff\x07\x08")
    shown(capsys, tmp_path / "data", "--svg", tmp_path / "row.svg")
    ElementTree.parse(tmp_path / "row.svg")  # a control character is no XML


def test_a_row_of_text_is_shown_as_training_cuts_it(folder, tmp_path, capsys):
    """Documents of 5 and 9 tokens in rows of 8: the second is cut, and its first token is read."""
    write_documents(tmp_path / "text", [[65, 66, 67, 68, 69], [70] * 9])
    words = ("--tokenizer", folder, "--seq-len", 8, "--split", "train")
    first = shown(capsys, tmp_path / "text", "--index", 0, *words)

    assert "document 0: 5 tokens, 4 learnt" in first and "document 1: 3 tokens, 2 learnt" in first
    assert "0 tokens of padding; 8 tokens, 6 learnt" in first


def test_a_picture_holds_the_learnt_text_in_its_own_colour(folder, tmp_path, capsys):
    shown(capsys, folder, "--svg", tmp_path / "row.svg")
    tree = ElementTree.parse(tmp_path / "row.svg")
    texts = {}
    for node in tree.iter("{http://www.w3.org/2000/svg}text"):
        texts.setdefault(node.get("class"), []).append((node.text or "").replace("\xa0", " "))
    classes = [c for c, found in texts.items() if any("<|channel|>analysis" in t for t in found)]
    others = [c for c, found in texts.items() if any("Knowledge cutoff" in t for t in found)]

    assert len(classes) == len(others) == 1 and classes != others
    assert [path.name for path in tmp_path.iterdir()] == ["row.svg"]


def test_a_terminal_gets_colours_unless_plain_is_asked_for(folder):
    program = "import sys; from ossature.data.show import main; main(sys.argv[1:])"
    found = []
    for words in ([], ["--plain"]):
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
        command = [sys.executable, "-c", program, str(folder), *words]
        process = Popen(command, stdout=theirs, env=environment)
        os.close(theirs)
        raw = b""
        while True:
            try:
                chunk = os.read(ours, 2**16)
            except OSError:  # what a pseudo-terminal says at its end
                break
            if not chunk:
                break
            raw += chunk
        os.close(ours)
        assert process.wait() == 0
        found.append(raw.decode())

    assert "\x1b[" in found[0] and "⟦" not in found[0]
    assert "\x1b[" not in found[1] and "⟦" in found[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--index", 1), "must be less than 1, the rows of split train"),
        (("--split", "test"), "must be less than 0"),
        (("--seq-len", 8), "its rows have 512 tokens"),
        (("--index", -1), "at least 0"),
        (("--plain", "--svg", "x"), "give one of them"),
    ],
)
def test_what_cannot_be_shown_is_refused(folder, words, message):
    with pytest.raises(ValueError, match=message):
        main([str(folder), *map(str, words)])
