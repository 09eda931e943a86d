"""Build a folder of chat data: parts in parallel, then files and rows per split, then the manifest.

As `assemble.py` does for text: the work lies in OUTPUT.partial until it is done, and neither the
number of workers nor a restart changes a byte.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ossature.data import harmony, workers
from ossature.data.bins import best_fit
from ossature.data.blend import SPLITS, split_documents
from ossature.data.chat import Options
from ossature.data.chat_parts import Arrays, Counts, Job, Record, Settings, arrays, make
from ossature.data.conversations import Shape, shape_of
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
from ossature.data.harmony import Rendering
from ossature.data.indexed import Writer, index_path, tokens_path
from ossature.data.packed import mask_path, rows_path, write_rows
from ossature.data.permutation import random_keys
from ossature.data.sources import Found, Part, Source, cut, find, records
from ossature.data.tokenizer import Tokenizer, load

CHUNK_DOCUMENTS = 2**14


def build_folder(options: Options) -> dict[str, Any]:
    """Write options.output and return its manifest; prints what was recognised and a summary.

    Raises:
        ValueError: inputs, records, tokenizer or output that are not as they must be.
        RuntimeError: a worker died.
    """
    began, output = time.monotonic(), options.output
    refuse_existing(output)
    by_split = {"train": options.inputs, "validation": options.validation, "test": options.test}
    found = {split: _find(inputs) for split, inputs in by_split.items() if inputs}
    shares = "" if options.validation or options.test else options.split
    sources = [source for group in found.values() for source in group.sources]
    shapes: dict[str, Shape] = {source.path: _shape(source, options) for source in sources}
    partial = output.with_name(f"{output.name}.partial")
    with locked(partial):
        tokenizer = load(options.tokenizer, options.vocabulary)
        harmony.check(tokenizer)
        tokenizer.save(partial / "tokenizer")
        prepare(partial / "tokenizer")
        (partial / "parts").mkdir(exist_ok=True)
        parts = [(split, part) for split in found for part in cut(found[split].sources)]
        settings = _settings(options)
        jobs = [_job(part, shapes, settings, tokenizer, partial, options) for _, part in parts]
        with hashes_of([source.path for source in sources]) as hashes:
            run = workers.run(make, jobs, num_workers(options.workers), lambda job: job.part.name)
            sizes = [part.stop - part.start or part.sources[0].size_bytes for _, part in parts]
            results = shown(_bounded(run, options.skip_bad), sizes, "tokenizing")
            source_hashes = [future.result() for future in hashes]
        folder = partial / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        leave_out = shutil.ignore_patterns(RANKS_FILE)
        shutil.copytree(partial / "tokenizer", folder, ignore=leave_out)
        counts = reduce(Counts.add, (record.counts for record in results), Counts())
        if not counts.documents:
            why = f", of which all {counts.conversations:,} were left out" if counts.lost else ""
            raise ValueError(f"{', '.join(options.inputs)}: no conversations to learn from{why}")
        splits = _write_splits(folder, jobs, [split for split, _ in parts], shares, options)
        manifest = {
            "ossature": version("ossature"),
            "inputs": {split: list(inputs) for split, inputs in by_split.items() if inputs},
            "tokenizer": {
                "name": options.tokenizer,
                "sha256": tokenizer.sha256(),
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
            },
            "split": shares or "by file",
            "splits": splits,
            "rows": {"seq_len": options.seq_len, "packed": options.pack},
            "chat": {
                "style": options.style,
                "analysis": options.analysis,
                "date": options.date,
                "loss": options.loss,
                "too_long": options.too_long,
                "ignore": list(options.ignore),
                "counts": counts._asdict(),
                "bad": [line for record in results for line in record.bad],
            },
            "ignored_files": [name for group in found.values() for name in group.ignored],
            "sources": [
                {
                    "path": source.path, "bytes": source.size_bytes, "sha256": digest,
                    "shape": shapes[source.path],
                }
                for source, digest in zip(sources, source_hashes, strict=True)
            ],
        }  # fmt: skip
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        finish(folder, output)
        shutil.rmtree(partial)
    _summary(manifest, results, time.monotonic() - began, output)
    return manifest


def _find(inputs: Sequence[str]) -> Found:
    """As `sources.find`, but files of text are no conversations."""
    found = find(inputs)
    texts = [source.path for source in found.sources if source.kind == "text"]
    for name in inputs:
        if name in texts:
            raise ValueError(f"{name}: not a file of records: give .jsonl or .parquet")
    sources = [source for source in found.sources if source.kind != "text"]
    if not any(source.size_bytes for source in sources):
        raise ValueError(f"{', '.join(inputs)}: no conversations in it")
    return Found(sources, found.ignored + texts)


def _shape(source: Source, options: Options) -> Shape:
    """Of the first record of a file that has one."""
    if options.shape != "auto":
        return options.shape
    reasons = []
    for entry in islice(records(source), options.skip_bad + 1):
        try:
            if entry.error:
                raise ValueError(entry.error)
            known = {k: v for k, v in entry.record.items() if k not in options.ignore}
            shape = shape_of(known)
        except ValueError as error:
            reasons.append(f"{source.path}: {entry.place()}: {error}")
        else:
            print(f"{source.path}: {shape}")
            return shape
    if reasons:
        raise ValueError(reasons[0])
    return "messages"  # an empty file


def _settings(options: Options) -> Settings:
    analysis = "" if options.analysis == "auto" else options.analysis
    rendering = Rendering(options.date, options.style, analysis)
    return Settings(rendering, options.loss, options.seq_len, options.too_long, options.ignore)


def _job(
    part: Part, shapes: dict[str, Shape], settings: Settings, tokenizer: Tokenizer,
    partial: Path, options: Options,
) -> Job:  # fmt: skip
    shape = shapes[part.sources[0].path]
    special = tuple((token, tokenizer.special[token]) for token in harmony.SPECIAL)
    folders = (f"{partial}/parts", f"{partial}/tokenizer")
    return Job(part, shape, settings, *folders, tokenizer.sha256(), special, options.skip_bad)


def _bounded(results: Iterator[tuple[int, Record]], skip_bad: int) -> Iterator[tuple[int, Record]]:
    """The results, as long as all parts together have no more bad records than are allowed."""
    bad = 0
    for n, record in results:
        bad += len(record.bad)
        if bad > skip_bad:
            raise ValueError(
                f"{record.bad[-1]} ({bad} bad records so far, {skip_bad} allowed: --skip-bad)"
            )
        yield n, record


def _write_splits(
    folder: Path, jobs: Sequence[Job], given: Sequence[str], shares: str, options: Options
) -> dict[str, dict[str, Any]]:
    """Tokens, masks and rows of every split.

    Args:
        given: split of each part.
        shares: if not empty, conversations are divided by them instead.
    """
    writers = {split: Writer(split_prefix(folder, split)) for split in SPLITS}
    masks = {split: mask_path(split_prefix(folder, split)).open("wb") for split in SPLITS}
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    learnt = dict.fromkeys(SPLITS, 0)
    drawn = _drawn(jobs, shares) if shares else None
    before = 0
    for job, split in zip(jobs, given, strict=True):
        part = arrays(job.path)
        total = _conversations(job)
        for name in SPLITS:
            if drawn is None:
                chosen = np.full(len(part.lengths), name == split)
            else:
                chosen = drawn[before + part.owners] == SPLITS.index(name)
            for tokens, mask, its_lengths in _chunks(part, chosen):
                writers[name].add(tokens, its_lengths)
                masks[name].write(mask.tobytes())
                lengths[name].append(its_lengths)
                learnt[name] += int(mask.sum(dtype=np.int64))
        before += total
    splits = {}
    for split in SPLITS:
        writers[split].close()
        masks[split].close()
        splits[split] = _finish_split(folder, split, lengths[split], learnt[split], options)
    return splits


def _conversations(job: Job) -> int:
    return json.loads(Path(f"{job.path}.json").read_text("utf-8"))["counts"][0]


def _drawn(jobs: Sequence[Job], shares: str) -> np.ndarray:
    """Number of the split of each conversation: a random draw with exact shares."""
    total = sum(_conversations(job) for job in jobs)
    order = np.argsort(random_keys(0, total, 0), kind="stable")
    drawn = np.zeros(total, np.int8)
    for n, wanted in enumerate(split_documents(total, shares).values()):
        drawn[order[wanted.start : wanted.stop]] = n
    return drawn


def _chunks(
    part: Arrays, chosen: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, mask and lengths of the chosen documents, in order, some thousand at a time."""
    ends = np.cumsum(part.lengths, dtype=np.int64)
    for start in range(0, len(ends), CHUNK_DOCUMENTS):
        keep = chosen[start : start + CHUNK_DOCUMENTS]
        if not keep.any():
            continue
        lengths = part.lengths[start : start + CHUNK_DOCUMENTS]
        span = slice(ends[start] - lengths[0], ends[start + len(lengths) - 1])
        tokens, mask = part.tokens[span], part.mask[span]
        if not keep.all():
            places = np.repeat(keep, lengths)
            tokens, mask, lengths = tokens[places], mask[places], lengths[keep]
        yield tokens, mask, lengths


def _finish_split(
    folder: Path, split: str, chunks: list[np.ndarray], learnt: int, options: Options
) -> dict[str, Any]:
    """Put the documents of a split into rows; what the manifest says about it."""
    prefix = split_prefix(folder, split)
    lengths = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
    if options.pack:
        order, starts = best_fit(lengths, options.seq_len)
    else:
        order, starts = np.arange(len(lengths)), np.arange(len(lengths) + 1)
    write_rows(prefix, order, starts)
    rows, tokens = len(starts) - 1, int(lengths.sum(dtype=np.int64))
    numbers = {
        "documents": len(lengths),
        "tokens": tokens,
        "learnt_tokens": learnt,
        "rows": rows,
        "filling": round(tokens / (rows * options.seq_len), 6) if rows else 0.0,
    }
    for path in (tokens_path, index_path, mask_path, rows_path):
        numbers[f"{path(prefix).suffix[1:]}_sha256"] = sha256(path(prefix))
    return numbers


def _summary(
    manifest: dict[str, Any], results: Sequence[Record], seconds: float, output: Path
) -> None:
    for split, numbers in manifest["splits"].items():
        share = numbers["learnt_tokens"] / numbers["tokens"] if numbers["tokens"] else 0
        print(
            f"{split:>12} {numbers['documents']:>10,} documents {numbers['tokens']:>13,} tokens, "
            f"{share:.1%} learnt, in {numbers['rows']:,} rows, {numbers['filling']:.2%} filled"
        )
    chat, kept = manifest["chat"], sum(record.tokens for record in results if record.found)
    counts = Counts(**chat["counts"])
    if counts.too_long:
        print(
            f"{counts.too_long:,} of {counts.conversations:,} conversations are longer than "
            f"{manifest['rows']['seq_len']:,} tokens: --too-long {chat['too_long']} left out "
            f"{counts.lost:,} documents and {counts.lost_tokens:,} tokens in all"
        )
    for line in chat["bad"]:
        print(f"left out: {line}")
    if manifest["ignored_files"]:
        names = ", ".join(manifest["ignored_files"][:3])
        print(f"{len(manifest['ignored_files']):,} files of other kinds not read ({names})")
    if kept:
        print(f"{kept:,} tokens found from an earlier start")
    print(
        f"{output}: {counts.conversations:,} conversations, {counts.tokens:,} tokens, "
        f"{(counts.tokens - kept) / seconds:,.0f} tokens/s"
    )
