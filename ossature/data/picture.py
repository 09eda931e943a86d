"""A row of tokens for the eyes: its documents, the learnt tokens in colour or in brackets."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from ossature.data.corpus import Corpus, open_corpus
from ossature.data.packed import PackedRows
from ossature.data.packing import Row, pack
from ossature.data.show import Options
from ossature.data.tokenizer import Tokenizer, load

LEARNT, READ, BORDER = "bold green", "bright_black", "yellow"
WIDTH = 100


class Span(NamedTuple):
    """Tokens in a row of one document and one mask, as text."""

    text: str
    learnt: bool


class Document(NamedTuple):
    tokens: int
    learnt: int
    """Tokens of which."""
    spans: list[Span]


class Shown(NamedTuple):
    title: str
    documents: list[Document]
    padding: int
    """Tokens at the end that belong to no document."""


def row_of(options: Options) -> Shown:
    """The row that the options name, read as training reads it.

    Raises:
        ValueError: nothing there, or fewer rows.
    """
    corpus = open_corpus(options.folder, options.split)
    if not options.folder.is_dir() and not options.tokenizer:
        raise ValueError(f"{options.folder}: a prefix has no tokenizer beside it: --tokenizer")
    tokenizer = load(options.tokenizer or options.folder)
    row, rows = _read(corpus, options)
    kind = f"{options.split} row {options.index} of {rows:,}"
    documents = [_document(row, number, tokenizer) for number in range(int(row.document.max()) + 1)]
    return Shown(f"{options.folder}: {kind}", documents, int((row.document < 0).sum()))


def _read(corpus: Corpus, options: Options) -> tuple[Row, int]:
    """The row, and how many there are."""
    if corpus.packing is not None:
        packed = PackedRows(corpus, *corpus.packing)
        if options.seq_len not in (0, packed.seq_len):
            raise ValueError(f"{options.folder}: its rows have {packed.seq_len} tokens: --seq-len")
        _check(options, packed.num_rows)
        return packed.row(options.index), packed.num_rows
    length = options.seq_len or 512
    rows = -(-corpus.num_tokens // length)
    _check(options, rows)
    start = options.index * length
    return pack(*corpus.read(start, min(start + length, corpus.num_tokens)), length), rows


def _check(options: Options, rows: int) -> None:
    if options.index >= rows:
        raise ValueError(
            f"--index ({options.index}) must be less than {rows}, the rows of split {options.split}"
        )


def _document(row: Row, number: int, tokenizer: Tokenizer) -> Document:
    places = np.flatnonzero(row.document == number)
    tokens, mask = row.tokens[places].tolist(), row.loss_mask[places].tolist()
    spans = [
        Span(visible(tokenizer.decode([token for token, _ in group])), learnt)
        for learnt, group in groupby(zip(tokens, mask, strict=True), key=lambda pair: pair[1])
    ]
    return Document(len(tokens), sum(mask), spans)


def visible(text: str) -> str:
    """The text with what a terminal would obey, or not show, spelled out: \\x1b, \\u202e.

    Line ends and tabs are as they are.  Text is written by others, and a terminal that is told to
    move back shows something else than what is learnt.
    """
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text
    )


def _borders(shown: Shown) -> Iterator[tuple[str, Document]]:
    for n, document in enumerate(shown.documents):
        yield f"── document {n}: {document.tokens} tokens, {document.learnt} learnt ", document


def _end(shown: Shown) -> str:
    tokens = sum(document.tokens for document in shown.documents)
    learnt = sum(document.learnt for document in shown.documents)
    return f"── {shown.padding} tokens of padding; {tokens} tokens, {learnt} learnt "


def plain(shown: Shown) -> str:
    """Learnt text between ⟦ and ⟧."""
    lines = [shown.title]
    for border, document in _borders(shown):
        lines.append(border.ljust(WIDTH, "─"))
        lines.append("".join(f"⟦{s.text}⟧" if s.learnt else s.text for s in document.spans))
    return "\n".join([*lines, _end(shown).ljust(WIDTH, "─")])


def coloured(shown: Shown) -> Text:
    """Learnt text in green, the rest in grey, borders in yellow."""
    text = Text(f"{shown.title}   ")
    text.append("learnt", LEARNT).append(" ").append("read only", READ)
    for border, document in _borders(shown):
        text.append(f"\n{border.ljust(WIDTH, '─')}\n", BORDER)
        for span in document.spans:
            text.append(span.text, LEARNT if span.learnt else READ)
    return text.append(f"\n{_end(shown).ljust(WIDTH, '─')}", BORDER)


def draw(shown: Shown, path: Path) -> None:
    """Write the picture as SVG."""
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, highlight=False)
        console.print(coloured(shown))
        svg = console.export_svg(title="ossature data show", unique_id="row")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(svg, "utf-8")
    partial.replace(path)
