"""A small chat set that teaches something: sums and look-ups, with thinking.

    python examples/make_chats.py FOLDER [--train 6000] [--seed 1]

FOLDER/train.jsonl has conversations in the shape `messages`; FOLDER/questions.jsonl has questions
that are in none of them, with their answers.  Every sum and every fact is asked in four wordings,
one of which is held out: of a held-out question neither the wording nor the numbers are new, but
only the two together.
"""

import argparse
import json
import random
from pathlib import Path

SUMS = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "{a} birds sit, {b} come. How many?",
    "I read {a} pages, then {b} pages. How many?",
)
LOOK_UPS = (
    "Which number has {name}?",
    "Give me the number of {name}.",
    "Look up {name}.",
    "{name} is in the list. What number?",
)
NAMES = ("red", "blue", "green", "data", "code", "file", "line", "test", "time", "path")


def questions(rng: random.Random) -> list[list[tuple[str, str, str, str]]]:
    """Of every sum and fact its wordings: kind, question, thinking, answer."""
    found = []
    for a in range(6):
        for b in range(6):
            total = str(a + b)
            texts = [wording.format(a=a, b=b) for wording in SUMS]
            found.append([("sum", text, f"{a} + {b} = {total}", total) for text in texts])
    for name, number in zip(NAMES, rng.sample(range(10), len(NAMES)), strict=True):
        texts = [wording.format(name=name) for wording in LOOK_UPS]
        found.append([("look-up", text, f"{name} has {number}", str(number)) for text in texts])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000, help="conversations")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    train, held_out = [], []
    for n, wordings in enumerate(questions(rng)):
        held_out.append(wordings.pop(n % len(wordings)))
        train += wordings
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for kind, question, _, answer in held_out:
            row = {"question": question, "answer": answer, "kind": kind}
            file.write(json.dumps(row) + "\n")
    with (options.folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(options.train):
            _, question, thinking, answer = rng.choice(train)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "thinking": thinking, "content": answer},
            ]
            file.write(json.dumps({"messages": messages, "reasoning_effort": "low"}) + "\n")
    print(
        f"{options.folder}: {options.train} conversations on {len(train)} questions, "
        f"{len(held_out)} others held out"
    )


if __name__ == "__main__":
    main()
