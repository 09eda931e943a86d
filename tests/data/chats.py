"""Small sets of conversations for the tests, and a tokenizer for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ossature.data import vocabulary
from ossature.data.chat import chat
from ossature.data.tokenizer import Tokenizer

WORDS = ["what", "is", "the", "sum", "of", "one", "and", "two", "it", "so", "say", "<|end|>"]
SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI. Knowledge cutoff: 2024-06 "
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)


def small_tokenizer(folder: Path, size: int = 400) -> Path:
    Tokenizer(vocabulary.train([" ".join(WORDS), SYSTEM] * 9, size), "toy").save(folder)
    return folder


def words(generator: np.random.Generator, most: int) -> str:
    return " ".join(generator.choice(WORDS, int(generator.integers(1, most))))


def conversations(
    count: int, seed: int = 0, turns: int = 3, most: int = 12
) -> list[dict[str, Any]]:
    """Of one to three turns, some with thinking, some with instructions."""
    generator = np.random.default_rng(seed)
    records = []
    for n in range(count):
        messages = [{"role": "system", "content": words(generator, most)}] if n % 3 == 0 else []
        for turn in range(int(generator.integers(1, 4))):
            messages.append({"role": "user", "content": words(generator, most)})
            answer = {"role": "assistant", "content": words(generator, most)}
            if (n + turn) % 2:
                answer["thinking"] = words(generator, most)
            messages.append(answer)
        records.append({"messages": messages})
    return records


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def data_chat(*given: Any) -> int:
    return chat([str(word) for word in given])
