"""Text that a model in training writes: on from prompts, or in harmony as the answer to a user.

A run on chat data asks what a user asks: `sample.prompts`, or the first questions of its own data,
with the instructions and the system message that they have there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from ossature.config import DataConfig, TrainConfig
from ossature.data.corpus import MANIFEST, open_corpus, read_manifest
from ossature.data.harmony import (
    CALL,
    END,
    MESSAGE,
    RETURN,
    START,
    Conversation,
    Message,
    Parser,
    Rendering,
    prompt,
)
from ossature.data.tokenizer import Tokenizer
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import inference
from ossature.sample.generate import generate

TEXT_PROMPTS = ("def ",)
QUESTIONS = 2
"""Taken from chat data when `sample.prompts` is empty."""
LOOKED_AT = 100
"""Conversations among which they are looked for."""


def samples(
    model: Transformer,
    tokenizer: Tokenizer,
    config: TrainConfig,
    seed: int,
    device: torch.device | None = None,
) -> list[dict[str, str]]:
    """Each prompt with what the model says next.  All ranks make the same call.

    Of chat data, `prompt` is what the user says, `text` the answer on the final channel, `harmony`
    all that was written, and `problem` what of it is not harmony; "" if all is.
    """
    folder = chat_folder(config.data)
    wanted = config.sample.prompts
    if folder is None:
        texts = wanted or TEXT_PROMPTS
        ends = {tokenizer.end_of_document}
        said = _say(model, list(map(tokenizer.encode, texts)), config, ends, seed, device)
        return [
            {"prompt": text, "text": tokenizer.decode(ids[:-1] if ids[-1] in ends else ids)}
            for text, ids in zip(texts, said, strict=True)
        ]
    prompts = asked(folder, wanted, tokenizer) if wanted else questions(folder, tokenizer)
    ends = {tokenizer.special[token] for token in (RETURN, CALL)} | {tokenizer.end_of_document}
    said = _say(model, prompts, config, ends, seed, device)
    return [
        {"prompt": last_message(ids, tokenizer), **answer(new, tokenizer)}
        for ids, new in zip(prompts, said, strict=True)
    ]


def chat_folder(data: DataConfig) -> Path | None:
    """The first data folder of a run, if `ossature data chat` made it."""
    words = [data.path] if data.path else " ".join(data.blend or data.train_blend).split()
    found = next((path for path in map(Path, words) if (path / MANIFEST).is_file()), None)
    return found if found is not None and "chat" in read_manifest(found) else None


def asked(folder: Path, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids after which an answer to a user's text comes, written down as in the data."""
    chat = read_manifest(folder)["chat"]
    rendering = Rendering(date=chat["date"], style=chat["style"])
    return [prompt(Conversation((Message("user", text),)), rendering, tokenizer) for text in texts]


def questions(folder: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The first conversations of the validation split, or of the training split if that is empty,
    up to where the assistant is to speak first.

    Raises:
        ValueError: none of the first hundred gets that far: they were cut before.
    """
    corpora = (open_corpus(folder, split) for split in ("validation", "train"))
    corpus = next(corpus for corpus in corpora if corpus.num_documents)
    cue = [tokenizer.special[START], *tokenizer.encode("assistant")]
    found = []
    for number in range(min(LOOKED_AT, corpus.num_documents)):
        file = corpus.file
        ids = file.tokens(file.document_start(number), file.document_start(number + 1)).tolist()
        starts = (n for n in range(len(ids)) if ids[n : n + len(cue)] == cue)
        if (start := next(starts, None)) is not None:
            found.append(ids[: start + len(cue)])
        if len(found) == QUESTIONS:
            break
    if not found:
        raise ValueError(
            f"{folder}: the first conversations of split {corpus.split} have no question to sample "
            "from: give sample.prompts"
        )
    return found


def check_prompts(config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """Find out before a run begins whether there is something to sample from."""
    if tokenizer is None:
        raise ValueError("sample.every_steps needs a corpus with a tokenizer: data.mock has none")
    folder = chat_folder(config.data)
    if folder is not None and not config.sample.prompts:
        questions(folder, tokenizer)


def last_message(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the last whole message."""
    end = len(ids) - 1 - ids[::-1].index(tokenizer.special[END])
    start = end - ids[:end][::-1].index(tokenizer.special[MESSAGE])
    return tokenizer.decode(ids[start:end])


def answer(ids: Sequence[int], tokenizer: Tokenizer) -> dict[str, str]:
    """What was written in harmony, taken apart."""
    parser = Parser(tokenizer)
    for token in ids:
        parser.push(token)
    if not parser.ended:
        parser.close()
    final = [message.text for message in parser.messages if message.channel == "final"]
    missing = "" if final else "nothing on the final channel"
    return {
        "text": final[-1] if final else "",
        "harmony": tokenizer.decode(ids),
        "problem": parser.problem or missing,
    }


def _say(
    model: Transformer,
    prompts: list[list[int]],
    config: TrainConfig,
    ends: Collection[int],
    seed: int,
    device: torch.device | None,
) -> list[list[int]]:
    """Ids that follow each prompt, with the end if there is one."""
    with inference(model):
        rows: Any = generate(
            model,
            prompts,
            max_new_tokens=config.sample.max_new_tokens,
            temperature=config.sample.temperature,
            stop_ids=ends,
            pad_id=min(ends),
            seed=seed,
            device=device,
        )
    found = []
    for row in rows[:, max(map(len, prompts)) :].tolist():
        stop = next((n for n, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(row[: stop + 1])
    return found
