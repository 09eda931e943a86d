"""`ossature data build`: text -> a folder of tokens that `ossature train` reads."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ossature.config import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Text to tokens: Megatron-compatible .bin and .idx, a manifest, and the tokenizer."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files (text, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of these, Hugging Face data
    sets (owner/name[:config][:split]), or python-stdlib: the sources of this Python's library."""
    output: Path
    """Folder to write; it must not exist or be empty.  OUTPUT.partial holds the work until it is
    done: after an interrupt the same command goes on from there."""
    tokenizer: str = ""
    """o200k_harmony (the default, that of gpt-oss), a tokenizer.json, a folder that has one, or a
    Hugging Face id."""
    vocabulary: Path | None = None
    """File with the vocabulary of o200k_harmony: o200k_base.tiktoken, or the tokenizer.json of a
    gpt-oss checkpoint."""
    train_tokenizer: int = 0
    """Train a byte-level BPE of this many tokens on the inputs instead (special tokens of harmony
    included); 0 does not."""
    split: str = "9999,8,2"
    """Shares of the documents for training, validation and test: contiguous ranges, in the order
    of the inputs or, with --shuffle, of the shuffle."""
    shuffle: int = 0
    """Seed of a shuffle of all documents, over all files, before they are divided among the splits;
    0 keeps the order of the inputs.  It takes one more copy of the tokens on disk while it runs,
    and memory for a bucket of 128 MiB, however much there is."""
    text_key: str = "text"
    """Key (JSONL) or column (Parquet, data sets) that holds the text."""
    workers: int = 0
    """Processes; 0 takes one per core.  They do not change a byte of the output."""

    def __post_init__(self) -> None:
        from ossature.data.blend import split_documents

        split_documents(0, self.split)
        if not self.inputs:
            raise ValueError("give at least one input: a file, a folder, or python-stdlib")
        for key in ("workers", "shuffle"):
            if getattr(self, key) < 0:
                raise ValueError(f"--{key} ({getattr(self, key)}) must be at least 0")
        if self.train_tokenizer and (self.tokenizer or self.vocabulary):
            raise ValueError("give --tokenizer or --train-tokenizer, not both")


def build(argv: list[str]) -> int:
    """The command."""
    options = parse(Options, argv, prog="ossature data build")
    from ossature.data.assemble import build_folder

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
