"""The chat sets of examples/: what the generator writes, and the file that the docs show."""

import json
import subprocess
import sys
from pathlib import Path

from ossature.data.conversations import conversation, shape_of

ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path, seed: int = 0) -> tuple[list[dict], list[dict]]:
    script = ROOT / "examples" / "make_chats.py"
    words = [folder, "--train", "400", "--held-out", "50", "--seed", seed]
    subprocess.run([sys.executable, script, *map(str, words)], check=True, capture_output=True)
    train, held_out = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    return train, held_out


def ask(record: dict) -> tuple[str, str, str]:
    (user, assistant) = record["messages"]
    return user["content"], assistant["thinking"], assistant["content"]


def test_answers_are_right_and_follow_from_the_thinking(tmp_path):
    train, held_out = generate(tmp_path)
    sums = 0
    for question, thinking, answer in map(ask, train + held_out):
        if "+" in question:
            a, b = question.removeprefix("What is").removesuffix("?").replace(" ", "").split("+")
            assert int(answer.replace(" ", "")) == int(a) + int(b)
            ones, tens = (part.split("=") for part in thinking.split(","))
            for left, right in (ones, tens):
                assert sum(map(int, left.split("+"))) == int(right.replace(" ", ""))
            assert answer == f"{tens[1].strip()} {ones[1].split()[-1]}"
            sums += 1
        else:
            listed, name = question.removesuffix(" ?").split(" . What is ")
            assert dict(pair.split(" = ") for pair in listed.split(" , "))[name] == answer
            assert thinking == f"{name} = {answer}"
    assert sums == (len(train) + len(held_out)) / 2


def test_no_held_out_question_is_trained_on(tmp_path):
    train, held_out = generate(tmp_path)
    questions = [ask(record)[0] for record in train + held_out]

    assert (len(train), len(held_out)) == (400, 50)
    assert len(set(questions)) == len(questions)


def test_the_seed_decides(tmp_path):
    assert generate(tmp_path / "a", 3) == generate(tmp_path / "b", 3)
    assert generate(tmp_path / "a", 3) != generate(tmp_path / "c", 4)


def test_the_file_in_the_docs_is_read():
    lines = (ROOT / "examples" / "chats.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    chats = [conversation(record, shape_of(record), frozenset()) for record in records]

    assert [len(chat.messages) for chat in chats] == [7, 6]
    assert chats[0].tools[0]["name"] == "weather"
