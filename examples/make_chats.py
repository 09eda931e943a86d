"""Write a small chat set: sums and look-ups with thinking, for `make demo-sft` and for trying out.

    python examples/make_chats.py FOLDER [--train 6000] [--held-out 200] [--seed 0]

FOLDER/train.jsonl and FOLDER/held_out.jsonl have records of the shape `messages`; no question is in
both.  A sum is worked out digit by digit in the thinking, so that its few steps, not every pair of
numbers, have to be learnt; digits stand apart, so that any tokenizer sees one token for each.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NAMES = (
    "apple", "bread", "chair", "door", "egg", "fish", "glass", "house", "ink", "jar", "key", "lamp",
    "moon", "nut", "oil", "pen", "ring", "salt", "tree", "wheel",
)  # fmt: skip


def spaced(number: int) -> str:
    """Digits apart: 47 is "4 7"."""
    return " ".join(str(number))


def addition(draw: random.Random) -> tuple[str, str, str]:
    """Two numbers of two digits; the thinking adds the ones, then the tens."""
    a, b = draw.randrange(10, 100), draw.randrange(10, 100)
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10 + ones // 10
    steps = f"{a % 10} + {b % 10} = {spaced(ones)} , "
    steps += f"{a // 10} + {b // 10} + {carry} = {spaced(tens)}"
    return f"What is {spaced(a)} + {spaced(b)} ?", steps, spaced(a + b)


def lookup(draw: random.Random) -> tuple[str, str, str]:
    """A list of four names with a digit each, and one of the names to find."""
    names = draw.sample(NAMES, 4)
    digits = [draw.randrange(10) for _ in names]
    place = draw.randrange(4)
    listed = " , ".join(f"{name} = {digit}" for name, digit in zip(names, digits, strict=True))
    question = f"{listed} . What is {names[place]} ?"
    return question, f"{names[place]} = {digits[place]}", str(digits[place])


TASKS: tuple[Callable[[random.Random], tuple[str, str, str]], ...] = (addition, lookup)


def dialogues(seed: int) -> Iterator[dict]:
    """Records without end, the tasks in turn, no question twice."""
    draw, asked = random.Random(seed), set()
    while True:
        for task in TASKS:
            question, thinking, answer = task(draw)
            while question in asked:
                question, thinking, answer = task(draw)
            asked.add(question)
            said = {"role": "assistant", "thinking": thinking, "content": answer}
            yield {"messages": [{"role": "user", "content": question}, said]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sums = 90 * 90
    if options.train + options.held_out > 2 * sums:
        parser.error(f"there are {sums} different sums: ask for at most {2 * sums} records in all")
    options.folder.mkdir(parents=True, exist_ok=True)
    records = dialogues(options.seed)
    for name, count in (("held_out", options.held_out), ("train", options.train)):
        path = options.folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(json.dumps(next(records)) + "\n")
        print(f"{path}: {count} dialogues")


if __name__ == "__main__":
    main()
