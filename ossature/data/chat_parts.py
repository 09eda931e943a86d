"""Conversations of one part of the input -> tokens and masks, in files that a later start finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ossature.data import harmony
from ossature.data.conversations import Shape, check_learnable, conversation
from ossature.data.encoder import RankEncoder, encoder
from ossature.data.harmony import Conversation, Loss, Piece, Rendering
from ossature.data.sources import Entry, Part, Source, records
from ossature.data.tokenizer import Tokenizer

BATCH_BYTES = 2**20
KINDS = ("bin", "mask", "lengths", "owners")


@dataclass(frozen=True)
class Settings:
    """What the tokens depend on, beside the input and the tokenizer."""

    rendering: Rendering
    loss: Loss
    seq_len: int
    too_long: Literal["error", "cut", "drop", "split"]
    ignore: tuple[str, ...]


class Job(NamedTuple):
    """All that a process needs to make a part."""

    part: Part
    shape: Shape
    settings: Settings
    folder: str
    """Where its files go: <key>.bin (tokens), .mask (a byte each), .lengths (of documents, i32),
    .owners (the conversation in this part each document is of, i32) and .json, which is written
    last: a part that has it is done."""
    tokenizer: str
    """Folder of the tokenizer."""
    tokenizer_sha256: str
    special: tuple[tuple[str, int], ...]
    """Special tokens and their ids."""
    skip_bad: int

    @property
    def path(self) -> Path:
        """Of its files, without suffix; it changes with whatever the tokens depend on."""
        depends_on = (self.part, self.shape, self.settings, self.tokenizer_sha256)
        key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]
        return Path(self.folder) / key


class Counts(NamedTuple):
    """Of conversations and of tokens; they add up."""

    conversations: int = 0
    """That were read, those that were left out too."""
    documents: int = 0
    """Written: one per conversation, or several where one was split."""
    tokens: int = 0
    learnt: int = 0
    """Tokens of which."""
    too_long: int = 0
    """Conversations of more than seq_len tokens."""
    lost: int = 0
    """Documents left out: too long, or nothing learnt is in what was kept of one that was."""
    lost_tokens: int = 0
    """Of these, and cut off."""

    def add(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Record(NamedTuple):
    """What a part came to."""

    counts: Counts
    bad: list[str]
    """Records that could not be read: file, place and reason."""
    sha256: list[str]
    """Of the files, in the order of KINDS."""
    found: bool = False
    """Made by an earlier start."""

    @property
    def tokens(self) -> int:
        return self.counts.tokens


class Document(NamedTuple):
    ids: list[int]
    mask: list[bool]
    owner: int


def make(job: Job) -> Record:
    """Write a part, unless it is there and whole.

    Raises:
        ValueError: more bad records than are allowed, or a conversation that is too long where
            that is an error; names file, place and reason.
    """
    path = job.path
    record = _find(path)
    if record is not None:
        return record
    partial = {kind: f"{path}.{kind}.partial-{os.getpid()}" for kind in (*KINDS, "json")}
    digests = {kind: hashlib.sha256() for kind in KINDS}
    counts, bad = Counts(), []
    files = {kind: open(partial[kind], "wb") for kind in KINDS}  # noqa: SIM115
    try:
        for batch in _batches(_conversations(job, bad)):
            first = counts.conversations
            documents, found = _encode(job, batch, first, bad)
            counts = counts.add(found)
            for kind, array in _arrays(documents).items():
                files[kind].write(array.data)
                digests[kind].update(array.data)
    finally:
        for file in files.values():
            file.close()
    record = Record(counts, bad, [digests[kind].hexdigest() for kind in KINDS])
    Path(partial["json"]).write_text(json.dumps(record._asdict()), "utf-8")
    for kind, written in partial.items():
        os.replace(written, f"{path}.{kind}")
    return record


class Read(NamedTuple):
    conversation: Conversation
    pieces: list[Piece]
    learnt: list[bool]
    size: int
    """Bytes of its text."""
    place: str
    """"FILE: line 7", or empty where no message can need it."""


def _conversations(job: Job, bad: list[str]) -> Iterator[Read]:
    settings = job.settings
    ignore = frozenset(settings.ignore)
    for source in job.part.sources:
        for entry in records(source, job.part.start, job.part.stop):
            try:
                if entry.error:
                    raise ValueError(entry.error)
                chat = conversation(entry.record, job.shape, ignore)
                check_learnable(chat)
                pieces = harmony.render(chat, settings.rendering)
                learnt = harmony.targets(chat, pieces, settings.loss)
                size = len(harmony.text(pieces).encode("utf-8"))
                if not any(learnt):
                    raise ValueError(f"nothing in it is learnt (--loss {settings.loss})")
            except UnicodeEncodeError:
                _note(job, bad, _place(source, entry), "half of a surrogate pair: no Unicode text")
                continue
            except ValueError as error:
                _note(job, bad, _place(source, entry), str(error))
                continue
            # The place takes time in a file that is cut, and only this rule asks for it.
            wanted = settings.too_long == "error" and size > settings.seq_len
            place = _place(source, entry) if wanted else source.path
            yield Read(chat, pieces, learnt, size, place)


def _place(source: Source, entry: Entry) -> str:
    return f"{source.path}: {entry.place()}"


def _note(job: Job, bad: list[str], place: str, reason: str) -> None:
    bad.append(f"{place}: {reason}")
    if len(bad) > job.skip_bad:
        allowed = f" ({job.skip_bad} bad records are allowed, --skip-bad)" if job.skip_bad else ""
        raise ValueError(f"{bad[-1]}{allowed}")


def _batches(reads: Iterator[Read]) -> Iterator[list[Read]]:
    batch: list[Read] = []
    size = 0
    for read in reads:
        batch.append(read)
        size += read.size
        if size >= BATCH_BYTES or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    job: Job, batch: Sequence[Read], first: int, bad: list[str]
) -> tuple[list[Document], Counts]:
    """Documents of a batch, by the rule for those that are too long."""
    settings = job.settings
    documents: list[Document] = []
    counts = Counts(conversations=len(batch))
    encoded = _ids(job, [(read.pieces, read.learnt) for read in batch])
    for n, (read, (ids, mask)) in enumerate(zip(batch, encoded, strict=True)):
        new = [(ids, mask)]
        if len(ids) > settings.seq_len:
            counts = counts.add(Counts(too_long=1))
            if settings.too_long == "error":
                raise ValueError(
                    f"{read.place}: {len(ids)} tokens, more than --seq-len ({settings.seq_len}): "
                    "choose --too-long cut, drop or split"
                )
            if settings.too_long == "drop":
                new = []
                counts = counts.add(Counts(lost=1, lost_tokens=len(ids)))
            elif settings.too_long == "split":
                new = _split(job, read.conversation)
        for ids, mask in new:
            kept = mask[: settings.seq_len]
            if not any(kept):
                counts = counts.add(Counts(lost=1, lost_tokens=len(ids)))
                continue
            documents.append(Document(ids[: settings.seq_len], kept, first + n))
            counts = counts.add(
                Counts(0, 1, len(kept), sum(kept), lost_tokens=len(ids) - len(kept))
            )
    return documents, counts


def _ids(
    job: Job, rendered: Sequence[tuple[list[Piece], list[bool]]]
) -> Iterator[tuple[list[int], list[bool]]]:
    """As `harmony.encode` of each; texts that occur several times are encoded once."""
    special = dict(job.special)
    texts = {piece.text: 0 for pieces, _ in rendered for piece in pieces if not piece.special}
    ids_of = dict(zip(texts, _encoder(job.tokenizer).encode_all(list(texts)), strict=True))
    for pieces, learnt in rendered:
        ids: list[int] = []
        mask: list[bool] = []
        for piece, wanted in zip(pieces, learnt, strict=True):
            if piece.special:
                ids.append(special[piece.text])
                mask.append(wanted)
            else:
                new = ids_of[piece.text]
                ids += new
                mask += [wanted] * len(new)
        yield ids, mask


def _split(job: Job, whole: Conversation) -> list[tuple[list[int], list[bool]]]:
    """Pieces of a conversation, each of as many turns as fit, rendered on their own."""

    def rendered(start: int, stop: int) -> tuple[list[int], list[bool]]:
        messages = (*head, *(message for turn in turns[start:stop] for message in turn))
        chat = replace(whole, messages=messages)
        pieces = harmony.render(chat, job.settings.rendering)
        learnt = harmony.targets(chat, pieces, job.settings.loss)
        return next(_ids(job, [(pieces, learnt)]))

    head = [message for message in whole.messages[:1] if message.role == "developer"]
    turns: list[list[harmony.Message]] = []
    for message in whole.messages[len(head) :]:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    pieces, start = [], 0
    while start < len(turns):
        best, stop = rendered(start, start + 1), start + 1
        while stop < len(turns):
            longer = rendered(start, stop + 1)
            if len(longer[0]) > job.settings.seq_len:
                break
            best, stop = longer, stop + 1
        pieces.append(best)
        start = stop
    return pieces


def _arrays(documents: Sequence[Document]) -> dict[str, np.ndarray]:
    lengths = np.array([len(document.ids) for document in documents], np.int32)
    tokens = [token for document in documents for token in document.ids]
    mask = [learnt for document in documents for learnt in document.mask]
    owners = np.array([document.owner for document in documents], np.int32)
    return {
        "bin": np.array(tokens, np.int32), "mask": np.array(mask, np.uint8),
        "lengths": lengths, "owners": owners,
    }  # fmt: skip


@lru_cache(maxsize=1)
def _encoder(folder: str) -> RankEncoder | Tokenizer:
    return encoder(folder)


def _find(path: Path) -> Record | None:
    """The record of a part that is there, if its files are those that were written."""
    try:
        fields = json.loads(Path(f"{path}.json").read_text("utf-8"))
        record = Record(Counts(*fields["counts"]), fields["bad"], fields["sha256"], found=True)
        for kind, digest in zip(KINDS, record.sha256, strict=True):
            with open(f"{path}.{kind}", "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return record


class Arrays(NamedTuple):
    """A finished part; tokens and mask are memory-mapped."""

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    owners: np.ndarray


def arrays(path: Path) -> Arrays:
    lengths = np.fromfile(f"{path}.lengths", np.int32)
    owners = np.fromfile(f"{path}.owners", np.int32)
    if not len(lengths):
        return Arrays(np.zeros(0, np.int32), np.zeros(0, np.uint8), lengths, owners)
    tokens = np.memmap(f"{path}.bin", np.int32, mode="r")
    return Arrays(tokens, np.memmap(f"{path}.mask", np.uint8, mode="r"), lengths, owners)
