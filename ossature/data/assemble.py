"""Build a data folder: parts in parallel, then one file per split, then the manifest.

While it is built everything lies in OUTPUT.partial: the tokenizer, a file per finished part, and
the folder that is renamed to OUTPUT at the end.  Parts are cut and named by the inputs alone, so
neither the number of workers nor a restart changes a byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ossature.data import vocabulary, workers
from ossature.data.blend import split_documents
from ossature.data.build import Options
from ossature.data.corpus import MANIFEST, split_prefix
from ossature.data.encoder import RANKS_FILE, prepare
from ossature.data.folder import (
    finish,
    hashes_of,
    locked,
    num_workers,
    refuse_existing,
    sha256,
    shown,
)  # fmt: skip
from ossature.data.indexed import Writer, index_path, tokens_path
from ossature.data.parts import Job, Record, make, tokens_and_lengths
from ossature.data.shuffle import Documents, shuffled
from ossature.data.sources import Part, cut, documents, find
from ossature.data.tokenizer import Tokenizer, load

TRAINING_BYTES = 2**28
"""Of text that a tokenizer is trained on, taken from all over the input."""


def build_folder(options: Options) -> dict[str, Any]:
    """Write options.output and return its manifest; prints progress and a summary.

    Raises:
        ValueError: inputs, tokenizer or output that are not as they must be.
        RuntimeError: a worker died.
    """
    began, output = time.monotonic(), options.output
    refuse_existing(output)
    found = find(options.inputs)
    parts = cut(found.sources)
    if not parts or not any(source.size_bytes for source in found.sources):
        raise ValueError(f"{', '.join(options.inputs)}: no text in it")
    partial = output.with_name(f"{output.name}.partial")
    with locked(partial):
        tokenizer, tokenizer_folder = _tokenizer(options, parts, partial)
        digest = tokenizer.sha256()
        (partial / "parts").mkdir(exist_ok=True)
        jobs = [
            Job(part, f"{partial}/parts", str(tokenizer_folder), digest, options.text_key)
            for part in parts
        ]
        with hashes_of([source.path for source in found.sources]) as hashes:
            sizes = [_size(job.part) for job in jobs]
            run = workers.run(make, jobs, num_workers(options.workers), lambda job: job.part.name)
            records = shown(run, sizes, "tokenizing")
            source_hashes = [future.result() for future in hashes]
        folder = partial / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tokenizer_folder, folder, ignore=shutil.ignore_patterns(RANKS_FILE))
        stretches = (tokens_and_lengths(job.path) for job in jobs)
        if options.shuffle:
            tokens = sum(record.tokens for record in records)
            stretches = shuffled(stretches, tokens, options.shuffle, partial / "buckets")
        documents_in_all = sum(record.documents for record in records)
        manifest = {
            "ossature": version("ossature"),
            "inputs": list(options.inputs),
            "text_key": options.text_key,
            "tokenizer": {
                "name": "trained" if options.train_tokenizer else _name(options),
                "sha256": digest,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
            },
            "split": options.split,
            "shuffle": options.shuffle,
            "splits": _write_splits(folder, stretches, documents_in_all, options.split),
            "empty_documents": sum(record.empty for record in records),
            "ignored_files": found.ignored,
            "sources": [
                {"path": source.path, "bytes": source.size_bytes, "sha256": found_digest}
                for source, found_digest in zip(found.sources, source_hashes, strict=True)
            ],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        finish(folder, output)
        shutil.rmtree(partial)
    _summary(manifest, records, time.monotonic() - began, output)
    return manifest


def _name(options: Options) -> str:
    return options.tokenizer or "o200k_harmony"


def _tokenizer(options: Options, parts: Sequence[Part], partial: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer, and a folder from which the workers load it."""
    folder = partial / "tokenizer"
    if options.train_tokenizer:
        depends_on = (tuple(parts), options.train_tokenizer, options.text_key)
        key = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
        folder = partial / f"tokenizer-{key}"
        if not folder.exists():  # otherwise an earlier start has trained it
            print(f"training a tokenizer of {options.train_tokenizer} tokens", flush=True)
            texts = _training_texts(parts, options.text_key)
            tokenizer = Tokenizer(vocabulary.train(texts, options.train_tokenizer), "trained")
            tokenizer.save(unfinished := partial / f"tokenizer.partial-{os.getpid()}")
            unfinished.rename(folder)
        return load(folder), folder
    tokenizer = load(_name(options), options.vocabulary)
    tokenizer.save(folder)
    prepare(folder)
    return tokenizer, folder


def _training_texts(parts: Sequence[Part], text_key: str) -> Iterator[str]:
    """Every n-th part, so that about TRAINING_BYTES are taken."""
    total = sum(_size(part) for part in parts)
    stride = 1 + total // TRAINING_BYTES
    taken = 0
    for part in parts[::stride]:
        for text in documents(part, text_key):
            yield text
            taken += len(text)
            if taken >= TRAINING_BYTES:
                return


def _size(part: Part) -> int:
    """Bytes, or for tables units: only shares of the whole are shown."""
    return part.stop - part.start or sum(source.size_bytes for source in part.sources)


def _write_splits(
    folder: Path, stretches: Iterator[Documents], total: int, shares: str
) -> dict[str, dict[str, Any]]:
    """Write documents, which come in order, to one indexed file per split.

    Args:
        total: number of documents.
    """
    ranges = split_documents(total, shares)
    writers = {split: Writer(split_prefix(folder, split)) for split in ranges}
    before = 0
    for tokens, lengths in stretches:
        ends = np.cumsum(lengths, dtype=np.int64)
        for split, wanted in ranges.items():
            first = max(wanted.start - before, 0)
            last = min(wanted.stop - before, len(lengths))
            if first < last:
                start, stop = ends[first] - lengths[first], ends[last - 1]
                writers[split].add(tokens[start:stop], lengths[first:last])
        before += len(lengths)
    assert before == total
    splits: dict[str, dict[str, Any]] = {}
    for split, writer in writers.items():
        writer.close()
        splits[split] = {"documents": writer.num_documents, "tokens": writer.num_tokens}
        for path in (tokens_path(writer.prefix), index_path(writer.prefix)):
            splits[split][f"{path.suffix[1:]}_sha256"] = sha256(path)
    return splits


def _summary(
    manifest: dict[str, Any], records: Sequence[Record], seconds: float, output: Path
) -> None:
    for split, numbers in manifest["splits"].items():
        print(f"{split:>12} {numbers['documents']:>12,} documents {numbers['tokens']:>15,} tokens")
    kept = sum(record.tokens for record in records if record.found)
    tokens = sum(record.tokens for record in records)
    documents = sum(record.documents for record in records)
    notes = [f"{kept:,} tokens found from an earlier start"] if kept else []
    if manifest["empty_documents"]:
        notes.append(f"{manifest['empty_documents']:,} empty documents left out")
    if manifest["ignored_files"]:
        names = ", ".join(manifest["ignored_files"][:3])
        notes.append(f"{len(manifest['ignored_files']):,} files of other kinds not read ({names})")
    for note in notes:
        print(note)
    print(
        f"{output}: {tokens:,} tokens, {documents:,} documents, vocabulary "
        f"{manifest['tokenizer']['vocab_size']:,}, {(tokens - kept) / seconds:,.0f} tokens/s"
    )
