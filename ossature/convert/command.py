"""`ossature convert SRC DST --to FORMAT`: write a checkpoint in another format."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ossature.config import parse

if TYPE_CHECKING:
    from ossature.convert.layout import Format
    from ossature.convert.transfer import Report


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write the weights of a checkpoint in another format, with config and tokenizer."""

    folder: tyro.conf.Positional[Path]
    """Checkpoint in any format (recognised), or the folder of a run (its newest checkpoint)."""
    output: tyro.conf.Positional[Path]
    """New folder, or for gguf a new file X.gguf; it exists when all of it is written, and not
    before."""
    to: Literal["bf16", "mxfp4", "openai", "native", "gguf", "peft"]
    """bf16, mxfp4: for transformers and vLLM.  openai: OpenAI's original/.  native: to train on.
    gguf: for llama.cpp; experts in MXFP4 stay so, other matrices are in bfloat16.  peft: of a run
    that trained adapters, these alone."""
    max_shard_size: str | None = None
    """A new file begins where a tensor would take one beyond this: 500MB, 4.5GiB; None is 5GB.
    For bf16, mxfp4 and openai; the others have files of their own sizes."""
    source: Path | None = None
    """MXFP4 folder the weights came from: an expert's group of 32 numbers that is exact on its
    scale there keeps it, so that what training left alone keeps its bytes."""


def convert(argv: list[str]) -> int:
    options = parse(ConvertOptions, argv, prog="ossature convert")
    if options.max_shard_size is not None and options.to not in ("bf16", "mxfp4", "openai"):
        raise ValueError(f"max_shard_size: --to {options.to} has no files of a given size")
    max_shard_bytes = size_bytes(options.max_shard_size or "5GB")
    if options.source is not None and options.to not in ("mxfp4", "openai"):
        raise ValueError(f"source: --to {options.to} has no scales to keep")

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from ossature.convert import folder as folders
    from ossature.convert.destination import check_free, check_no_file
    from ossature.convert.gguf_write import check_suffix, notes, tensors, write_gguf
    from ossature.convert.layout import TITLES
    from ossature.convert.source import check_same_shape

    if options.to == "gguf":
        check_suffix(options.output)
        check_no_file(options.output)
    else:
        check_free(options.output)
    if options.to == "peft":
        return write_adapter(options)
    to: Format = options.to
    source = folders.open_source(options.folder)
    scales = None if options.source is None else folders.open_source(options.source)
    if scales is not None:
        if scales.format not in ("mxfp4", "openai"):
            raise ValueError(f"{scales.folder}: source must be in MXFP4, not {scales.format}")
        check_same_shape(source, scales)
    if options.to == "gguf":
        total = sum(place.num_bytes for place in tensors(source).values())
    else:
        total = folders.size_bytes(source, to)
    print(f"{source.folder}: {TITLES[source.format]} -> {TITLES[to]}")
    start = time.monotonic()
    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        if options.to == "gguf":
            report = write_gguf(source, options.output, lambda n: bar.advance(task, n))
        else:
            report = folders.write_folder(
                source,
                options.output,
                to,
                max_shard_bytes=max_shard_bytes,
                scales=scales,
                advance=lambda n: bar.advance(task, n),
            )
    seconds = time.monotonic() - start
    for line in describe(report):
        print(line)
    for line in notes(source) if options.to == "gguf" else []:
        print(line)
    if source.format == "gguf":
        print(f"{source.folder}: its tokenizer is not carried along: put tokenizer.json beside")
    print(f"{options.output}: {total / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


def write_adapter(options: ConvertOptions) -> int:
    from ossature.convert.adapters import is_adapter_folder, open_adapter, write_peft
    from ossature.convert.base import BASE, read_base
    from ossature.convert.config import read_config
    from ossature.convert.folder import resolve

    folder = resolve(options.folder)
    if not is_adapter_folder(folder):
        raise ValueError(f"{folder}: holds no adapter: not a run with lora.rank")
    config = read_config(folder / "config.json")
    adapter = open_adapter(folder, config)
    base = read_base(folder)
    extra = {} if base is None else {BASE: base.text()}
    for line in write_peft(adapter, config, options.output, extra):
        print(line)
    print(f"{options.output}: adapters on {', '.join(adapter.lora.targets)} of {adapter.base}")
    return 0


def describe(report: Report) -> list[str]:
    """What a conversion did to numbers, in sentences."""
    lines = [
        f"{count} tensors rounded from {dtype} to bfloat16"
        for dtype, count in sorted(report.cast.items())
    ]
    exact = report.recoded - len(report.inexact)
    if report.recoded:
        lines.append(
            f"experts quantised to MXFP4: {exact} of {report.recoded} matrices exact to the bit"
        )
    if report.inexact:
        worst = max(report.inexact, key=lambda name: report.inexact[name].relative)
        whole = report.inexact[worst]
        for name, error in report.inexact.items():
            whole = whole if name == worst else whole.plus(error)
        lines.append(
            f"quantisation error of the others: {whole.relative:.2%} of their norm, "
            f"at most {whole.largest:.4g} in a number; "
            f"worst {worst}: {report.inexact[worst].relative:.2%}"
        )
    return lines


def size_bytes(text: str) -> int:
    """ "5GB" -> 5_000_000_000; KB, MB, GB and TB are powers of 1000, KiB to TiB of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"max_shard_size: {text!r} is no size; write it like 5GB or 500MB")
    unit = (1024 if match[3] else 1000) ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0)
    size = int(float(match[1]) * unit)
    if not size:
        raise ValueError(f"max_shard_size: {text!r} holds no tensor; it must be at least 1 byte")
    return size
