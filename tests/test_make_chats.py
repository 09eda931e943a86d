"""The chat sets of examples/: what the generator writes, and the file that the docs show."""

import json
import re
import subprocess
import sys
from pathlib import Path

from ossature.data.conversations import conversation, shape_of

ROOT = Path(__file__).resolve().parent.parent


def generate(folder: Path, seed: int = 1) -> tuple[list[dict], list[dict]]:
    script = ROOT / "examples" / "make_chats.py"
    words = [folder, "--train", "1500", "--seed", seed]
    subprocess.run([sys.executable, script, *map(str, words)], check=True, capture_output=True)
    train, questions = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "questions")
    )
    return train, questions


def ask(record: dict) -> tuple[str, str, str]:
    (user, assistant) = record["messages"]
    return user["content"], assistant["thinking"], assistant["content"]


def test_answers_are_right_and_follow_from_the_thinking(tmp_path):
    train, questions = generate(tmp_path)
    facts = {}
    for question, thinking, answer in map(ask, train):
        if "=" in thinking:
            left, right = thinking.split(" = ")
            assert str(sum(map(int, left.split(" + ")))) == right == answer
            assert sorted(re.findall(r"\d+", question)) == sorted(left.split(" + "))
        else:
            name, _, number = thinking.partition(" has ")
            assert name in question and number == answer
            assert facts.setdefault(name, number) == number
    for row in questions:
        found = re.findall(r"\d+", row["question"])
        if row["kind"] == "sum":
            assert row["answer"] == str(sum(map(int, found)))
        else:
            assert [row["answer"]] == [n for name, n in facts.items() if name in row["question"]]


def test_no_question_held_out_is_trained_on(tmp_path):
    train, questions = generate(tmp_path)
    asked = {ask(record)[0] for record in train}
    held_out = {row["question"] for row in questions}

    assert (len(train), len(held_out)) == (1500, 46)
    assert len(asked) == 3 * 46 and not asked & held_out


def test_the_seed_decides(tmp_path):
    assert generate(tmp_path / "a", 3) == generate(tmp_path / "b", 3)
    assert generate(tmp_path / "a", 3) != generate(tmp_path / "c", 4)


def test_the_file_in_the_docs_is_read():
    lines = (ROOT / "examples" / "chats.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    chats = [conversation(record, shape_of(record), frozenset()) for record in records]

    assert [len(chat.messages) for chat in chats] == [7, 6]
    assert chats[0].tools[0]["name"] == "weather"
