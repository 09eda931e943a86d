"""A small chat set that teaches something: sums and look-ups, with thinking, by seed.

    python examples/make_chats.py FOLDER [--train 6000] [--questions 120] [--seed 1]

FOLDER/train.jsonl has conversations in the shape `messages`; FOLDER/questions.jsonl has questions
that are in none of them, with their answers.  A sum is asked in several wordings: of a question
held out, neither the wording nor the numbers are new, only the two together.  In a look-up the
list itself is new each time.
"""

import argparse
import json
import random
from pathlib import Path

SUMS = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "Tom has {a} pens and finds {b} more. How many pens has he?",
    "{a} birds sit on a tree, {b} come. How many are there?",
    "I read {a} pages, then {b} pages. How many pages did I read?",
)
NAMES = ("red", "blue", "green", "black", "white", "pink")


def a_sum(rng: random.Random) -> tuple[str, str, str]:
    """Question, thinking, answer."""
    a, b = rng.randrange(10), rng.randrange(10)
    return rng.choice(SUMS).format(a=a, b=b), f"{a} + {b} = {a + b}", str(a + b)


def a_look_up(rng: random.Random) -> tuple[str, str, str]:
    names = rng.sample(NAMES, 3)
    numbers = [rng.randrange(10) for _ in names]
    listed = ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    n = rng.randrange(3)
    question = f"The boxes: {listed}. Which number has {names[n]}?"
    return question, f"{names[n]} {numbers[n]}", str(numbers[n])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    held_out: dict[str, tuple[str, str]] = {}
    while len(held_out) < options.questions:
        kind = ("sum", "look-up")[len(held_out) % 2]
        question, _, answer = (a_sum if kind == "sum" else a_look_up)(rng)
        held_out[question] = kind, answer
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for question, (kind, answer) in held_out.items():
            row = {"question": question, "answer": answer, "kind": kind}
            file.write(json.dumps(row) + "\n")
    written = 0
    with (options.folder / "train.jsonl").open("w", encoding="utf-8") as file:
        while written < options.train:
            question, thinking, answer = rng.choice((a_sum, a_look_up))(rng)
            if question in held_out:
                continue
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "thinking": thinking, "content": answer},
            ]
            file.write(json.dumps({"messages": messages, "reasoning_effort": "low"}) + "\n")
            written += 1
    print(f"{options.folder}: {written} conversations, {len(held_out)} questions held out")


if __name__ == "__main__":
    main()
