"""Bits per byte of text that the model was not trained on: comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ossature.data.corpus import MANIFEST, open_corpus
from ossature.data.sources import cut, documents, find
from ossature.data.tokenizer import load
from ossature.eval.answers import key_of
from ossature.eval.likelihood import Row
from ossature.eval.options import TaskOptions
from ossature.eval.results import Metric, Outcome
from ossature.eval.subject import Subject

DOCUMENTS = 200
WINDOW = 4096
"""Tokens of a row; a longer document is read in several, each of which begins anew."""


def bits_per_byte(subject: Subject, options: TaskOptions, argument: str) -> Outcome:
    """Of each document: an item; all together weighted by their bytes.

    The first token is asked after the end of a document, as in training.
    """
    size = min(WINDOW, subject.model.config.max_position_embeddings)
    end = subject.tokenizer.end_of_document
    texts = list(islice(_documents(subject, Path(argument)), options.limit or DOCUMENTS))
    if not texts:
        raise ValueError(f"{argument}: no document with any text")
    rows, owner = [], []
    for n, tokens in enumerate(texts):
        for row in windows(tokens, end, size):
            rows.append(row)
            owner.append(n)
    nats = [0.0] * len(texts)
    for n, score in zip(owner, subject.scores(rows, "bits_per_byte"), strict=True):
        nats[n] -= score.logprob
    read = [len(subject.tokenizer.decode(tokens).encode()) for tokens in texts]
    values = [nat / math.log(2) / size for nat, size in zip(nats, read, strict=True)]
    metrics = {"bits_per_byte": Metric(values, read)}
    # By text and not by token: two models with other tokenizers can be compared.
    return Outcome(key_of([subject.tokenizer.decode(tokens) for tokens in texts]), metrics)


def windows(tokens: Sequence[int], end: int, size: int) -> Iterator[Row]:
    """Rows of at most `size` tokens that ask every token once; a row knows nothing of the last."""
    before = end
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        yield Row([before], part)
        before = part[-1]


def _documents(subject: Subject, path: Path) -> Iterator[list[int]]:
    """Tokens of each document, its end left out."""
    if (path / MANIFEST).is_file():
        yield from _of_corpus(subject, path)
        return
    for part in cut(find([str(path)]).sources):
        for text in documents(part, "text"):
            if text:
                yield subject.tokenizer.encode(text)


def _of_corpus(subject: Subject, path: Path) -> Iterator[list[int]]:
    corpus = open_corpus(path, "validation")
    if corpus.packing is not None:
        raise ValueError(f"{path}: holds rows of chats; bits_per_byte reads documents")
    theirs = load(path)
    same = theirs.sha256() == subject.tokenizer.sha256()
    for n in range(corpus.num_documents):
        places = corpus.file.document_start(n), corpus.file.document_start(n + 1)
        tokens = corpus.file.tokens(*places).tolist()
        found = [token for token in tokens if token != theirs.end_of_document]
        if found:
            # The same text, where the model reads it in other tokens.
            yield found if same else subject.tokenizer.encode(theirs.decode(found))
