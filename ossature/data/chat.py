"""`ossature data chat`: conversations -> a folder of packed rows that `ossature train` reads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import tyro

from ossature.config import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Conversations to rows of tokens in harmony, with the mask of what is learnt."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of these, or Hugging Face data sets
    (owner/name[:config][:split])."""
    output: Path
    """Folder to write; it must not exist or be empty.  OUTPUT.partial holds the work until it is
    done: after an interrupt the same command goes on from there."""
    seq_len: int
    """Tokens of a row, and the most that a conversation may have."""
    tokenizer: str = "o200k_harmony"
    """o200k_harmony (that of gpt-oss), a tokenizer.json, a folder that has one, such as a data
    folder, or a Hugging Face id."""
    vocabulary: Path | None = None
    """File with the vocabulary of o200k_harmony: o200k_base.tiktoken, or the tokenizer.json of a
    gpt-oss checkpoint."""
    shape: Literal["auto", "messages", "completion", "alpaca", "sharegpt"] = "auto"
    """Of the records: messages with roles; prompt and completion; Alpaca's instruction, input and
    output; ShareGPT's from and value.  auto takes that of the first record of each file."""
    ignore: tuple[str, ...] = ()
    """Keys of records that say nothing about the conversation, such as an id; all other keys that
    are not known are errors."""
    loss: Literal["assistant", "final", "last_turn", "all"] = "assistant"
    """What is learnt.  assistant: all that the model emits, the ends of its messages included, but
    not the header it is prompted with; final: its answers alone; last_turn: what it emits after the
    last message of the user; all: its messages whole."""
    style: Literal["template", "openai"] = "template"
    """Write harmony as the chat template of the model's repository does, or as openai-harmony."""
    analysis: Literal["auto", "last", "first_final", "all"] = "auto"
    """Which thinking stays in the text.  last: that of the last answer; first_final: all from the
    first answer on; auto: last with style template, first_final with style openai."""
    date: str = "2025-06-28"
    """Date in the system message, YYYY-MM-DD.  Never today's, so that data can be made again."""
    too_long: Literal["error", "cut", "drop", "split"] = "error"
    """A conversation of more than seq_len tokens: stop; keep its first seq_len tokens; leave it
    out; or split it before messages of the user, each piece with the instructions at its head, a
    piece of one turn that is still too long being cut."""
    skip_bad: int = 0
    """Leave out at most so many records that cannot be read; each is named.  One more stops."""
    split: str = "98,2,0"
    """Shares of the conversations for training, validation and test, drawn at random with a fixed
    seed; what goes to which does not depend on anything but their number."""
    validation: tuple[str, ...] = ()
    """Inputs of the validation split; with this or --test the shares do not count."""
    test: tuple[str, ...] = ()
    """Inputs of the test split."""
    pack: bool = True
    """Several conversations in a row (best-fit decreasing); false gives each a row of its own."""
    workers: int = 0
    """Processes; 0 takes one per core.  They do not change a byte of the output."""

    def __post_init__(self) -> None:
        from ossature.data.blend import split_documents

        split_documents(0, self.split)
        if not self.inputs:
            raise ValueError("give at least one input: a file, a folder or a data set")
        try:
            known = date.fromisoformat(self.date).isoformat() == self.date
        except ValueError:
            known = False
        if not known:
            raise ValueError(f"--date ({self.date}) must be a day, as YYYY-MM-DD")
        for key, least in (("seq_len", 2), ("skip_bad", 0), ("workers", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"--{key} ({getattr(self, key)}) must be at least {least}")


def chat(argv: list[str]) -> int:
    """The command."""
    options = parse(Options, argv, prog="ossature data chat")
    from ossature.data.chat_folder import build_folder

    try:
        build_folder(options)
    except KeyboardInterrupt:
        print(
            f"interrupted: finished parts are kept in {options.output}.partial; the same command "
            "goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0
