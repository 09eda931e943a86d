"""How many questions does a model answer exactly, in harmony?

    python examples/exact_match.py MODEL QUESTIONS.jsonl [--adapter RUN] [--limit N]

Greedy.  An answer counts if the text of the channel `final` is the one expected.
"""

import argparse
import json
from pathlib import Path

import torch

import ossature
from ossature.convert.folder import resolve
from ossature.convert.model import load_adapter
from ossature.data.harmony import CALL, RETURN, Conversation, Message, Parser, Rendering, prompt
from ossature.data.tokenizer import load

RENDERING = Rendering("2025-06-28")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("questions", type=Path)
    parser.add_argument("--adapter", default="")
    parser.add_argument("--limit", type=int, default=0)
    options = parser.parse_args()
    model = ossature.load_model(options.model, dtype=torch.float32)
    if options.adapter:
        load_adapter(model, options.adapter)
    model.eval()
    tokenizer = load(resolve(options.model))
    rows = [json.loads(line) for line in options.questions.read_text("utf-8").splitlines()]
    rows = rows[: options.limit or None]
    chats = [
        Conversation((Message("user", row["question"]),), reasoning_effort="low") for row in rows
    ]
    prompts = [prompt(chat, RENDERING, tokenizer) for chat in chats]
    stop = [tokenizer.special[RETURN], tokenizer.special[CALL]]
    said = ossature.generate(model, prompts, max_new_tokens=32, stop_ids=stop, pad_id=stop[0])
    start = max(map(len, prompts))
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    parsed = 0
    for row, ids in zip(rows, said[:, start:].tolist(), strict=True):
        reader = Parser(tokenizer)
        for token in ids:
            reader.push(token)
            if reader.ended:
                break
        reader.close()
        answers = [m.text for m in reader.messages if m.channel == "final"]
        kind = row.get("kind", "all")
        total[kind] = total.get(kind, 0) + 1
        right[kind] = right.get(kind, 0) + (answers == [row["answer"]])
        parsed += not reader.problem
    kinds = ", ".join(f"{kind} {right[kind]}/{total[kind]}" for kind in total)
    share = sum(right.values()) / len(rows)
    print(
        f"exact match {share:.1%} of {len(rows)} ({kinds}); valid harmony {parsed / len(rows):.1%}"
    )


if __name__ == "__main__":
    main()
