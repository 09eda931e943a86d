"""Any folder with weights: which format it is, reading it, writing one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ossature.checkpoint.safetensors import Reader, Writer, shard_name
from ossature.checkpoint.store import INDEX, newest
from ossature.convert import hugging_face, original
from ossature.convert.config import read_json
from ossature.convert.destination import new_folder
from ossature.convert.gguf import GgufSource
from ossature.convert.layout import FORMATS, Format, specs
from ossature.convert.native import NativeSource, balance_sentence, write_native
from ossature.convert.source import PublishedSource, Source
from ossature.convert.transfer import Report, transfer

MAX_SHARD_BYTES = 5_000_000_000
BASE = "base.json"
"""Marks a checkpoint that holds an adapter alone; see `ossature.convert.base`."""


def resolve(path: Path | str) -> Path:
    """The folder that holds the weights: of a run, its newest whole checkpoint; or a GGUF file.

    A folder without weights of its own that has `original/` stands for that.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / INDEX).is_file() or any(folder.glob("*.safetensors*")):
        return folder
    if (folder / "checkpoints").is_dir() or (folder / "run.json").is_file():
        found = newest(folder)
        if found is None:
            raise ValueError(f"{folder}: a run without a whole checkpoint yet")
        return found
    if (folder / "original").is_dir():
        return resolve(folder / "original")
    raise ValueError(f"{folder}: holds no weights: no *.safetensors, no {INDEX}, no checkpoints/")


def detect(path: Path | str) -> Format:
    """The format of a folder.

    Raises:
        ValueError: it has no weights or no config.json.
    """
    folder = resolve(path)
    if folder.is_file():
        return "gguf"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: has no config.json")
    if (folder / INDEX).is_file():
        return "native"
    if "model_type" in read_json(folder / "config.json"):
        return hugging_face.format_of(Reader(folder))
    return "openai"


def open_source(path: Path | str, *, balance_bias: bool = False) -> Source:
    """The weights of a folder in any format.

    Args:
        balance_bias: let a checkpoint pass whose routers have balancing biases; the reader of it
            takes care of them.

    Raises:
        UnknownTensor, ValueError: the folder is damaged, or is not of this architecture.
    """
    folder = resolve(path)
    format = detect(folder)
    if (folder / BASE).is_file():
        raise ValueError(
            f"{folder}: holds an adapter and no model: `ossature merge` puts it into its base"
        )
    if format == "gguf":
        return GgufSource(folder)
    if format == "native":
        source = NativeSource(folder)
        if not balance_bias:
            for name in source.balance_biases():
                raise ValueError(f"{folder}: {balance_sentence(name)}")
        return source
    return (
        original.open_original(folder)
        if format == "openai"
        else (hugging_face.open_hugging_face(folder))
    )


def write_folder(
    source: Source,
    folder: Path | str,
    format: Format,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    scales: Source | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Report:
    """Write the weights of a source, with config.json and tokenizer, to a new folder.

    Args:
        scales: an MXFP4 folder of the same shape, for `transfer`.
        advance: called with the number of bytes of every piece that is written.

    Raises:
        ValueError: the folder is not empty, or the format cannot hold this model.
        OSError: the disk is full, or the like.  No part is left under the folder's name.
    """
    if format not in FORMATS:
        raise ValueError(f"format ({format!r}) must be one of {', '.join(FORMATS)}")
    assert format != "gguf"
    folder = Path(folder)
    expected = size_bytes(source, format)
    with new_folder(folder, expected) as partial:
        for file in source.files:
            shutil.copyfile(file, partial / file.name)
        if format == "native":
            write_native(source, partial, advance)
            return Report()
        tensors = specs(source.config, format)
        if format == "openai":
            original.write_configs(partial, source.config, tensors)
        else:
            hugging_face.write_configs(partial, source.config, format)
        name_of = original.shard_name if format == "openai" else shard_name
        for read in (source, scales):
            if isinstance(read, PublishedSource):
                read.reader.once = True
        writer = Writer(partial, tensors, max_shard_bytes, name_of)
        try:
            report = transfer(source, writer, format, scales, advance)
            writer.finish()
        finally:
            writer.close()
        return report


def size_bytes(source: Source, format: Format) -> int:
    """Of all tensors, in a format of folders."""
    assert format != "gguf"
    if format == "native":
        return sum(source.spec(name).num_bytes for name in source.names())
    return sum(spec.num_bytes for spec in specs(source.config, format).values())
