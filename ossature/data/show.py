"""`ossature data show FOLDER --index K`: one row as the model gets it, what is learnt marked."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ossature.config import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show one row of a data folder: its documents, and which tokens are learnt."""

    folder: tyro.conf.Positional[Path]
    """Folder made by `ossature data chat` or `data build`, or a prefix with .bin and .idx."""
    index: int = 0
    """Number of the row, from 0, in the order of the files; training shuffles rows."""
    split: Literal["train", "validation", "test"] = "train"
    seq_len: int = 0
    """Tokens of a row; 0 takes that of a chat folder, and 512 for others."""
    tokenizer: str = ""
    """For a prefix, which has none beside it: as in `ossature data build`."""
    plain: bool = False
    """No colours: what is learnt stands between ⟦ and ⟧, as it does where there is no terminal."""
    svg: Path | None = None
    """Write the picture to this file instead."""

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"--index ({self.index}) must be at least 0")
        if self.seq_len < 0:
            raise ValueError(f"--seq-len ({self.seq_len}) must be at least 0")
        if self.plain and self.svg is not None:
            raise ValueError("--svg draws colours, --plain has none: give one of them")


def main(argv: list[str]) -> int:
    """The command."""
    options = parse(Options, argv, prog="ossature data show")
    from ossature.data.picture import coloured, draw, plain, row_of

    row = row_of(options)
    if options.svg is not None:
        draw(row, options.svg)
        print(options.svg)
    elif options.plain or not sys.stdout.isatty():
        print(plain(row))
    else:
        from rich.console import Console

        Console(highlight=False).print(coloured(row))
    return 0
