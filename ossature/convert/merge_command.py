"""`ossature merge BASE ADAPTER DST --to FORMAT`: weights with an adapter merged in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ossature.config import parse

if TYPE_CHECKING:
    from ossature.convert.source import Source

VANISHED = 0.5
"""Share of an adapter's effect below which a merge is warned of."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Write a base model with an adapter merged in, and say what of the adapter is there."""

    base: tyro.conf.Positional[Path]
    """Checkpoint in any format, or a run: the model that the adapter was trained on."""
    adapter: tyro.conf.Positional[Path]
    """Adapter in PEFT's format, or a run (its newest checkpoint) that trained one."""
    output: tyro.conf.Positional[Path]
    """New folder; it exists when all of it is written, and not before."""
    to: Literal["bf16", "mxfp4"] = "bf16"
    """Both are for transformers and vLLM.  Of an adapter on experts, 4 bits keep only a part."""
    max_shard_size: str = "5GB"
    """A new file begins where a tensor would take one beyond this: 5GB, 500MB, 4.5GiB."""


def stored_as(source: Source, name: str) -> tuple[str, bool]:
    """The type of a weight's numbers in a folder, and whether they are packed."""
    return str(source.spec(name).dtype), source.packed(name, 0, 0) is not None


def merge(argv: list[str]) -> int:
    options = parse(MergeOptions, argv, prog="ossature merge")

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from ossature.convert import folder as folders
    from ossature.convert.adapters import CONFIG, find_adapter, target_of
    from ossature.convert.base import BASE, identity, read_base
    from ossature.convert.command import describe, size_bytes
    from ossature.convert.destination import check_free
    from ossature.convert.merge import Effect, MergedSource, effects

    check_free(options.output)
    most = size_bytes(options.max_shard_size)
    base = folders.open_source(options.base)
    adapter = find_adapter(options.adapter, base.config)
    folder = adapter.folder
    trained_on = read_base(folder)
    if trained_on is None and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: lacks {BASE}, which says what its adapter was trained on")
    if trained_on is None:
        print(
            f"{folder}: PEFT's format does not say which weights the adapter was trained on, but "
            f"for a name ({adapter.base or 'none'}): that those in {base.folder} are them is not "
            "checked"
        )
    elif trained_on.identity != identity(options.base):
        print(
            f"warning: {adapter.folder}: the adapter was trained on "
            f"{trained_on.folder or 'random weights'}, and the weights in {base.folder} are others"
        )
    merged = MergedSource(base, adapter)
    packed = base.format in ("mxfp4", "openai")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    found: dict[str, Effect] = {}
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("writing", total=folders.size_bytes(merged, options.to))
        report = folders.write_folder(
            merged, options.output, options.to, max_shard_bytes=most,
            scales=base if packed and options.to == "mxfp4" else None,
            advance=lambda n: bar.advance(task, n),
        )  # fmt: skip
        touched = [name for name in base.names() if merged.touches(name)]
        size = sum(math.prod(s.shape) * s.dtype.itemsize for s in map(base.spec, touched))
        task = bar.add_task("checking", total=size)
        written = folders.open_source(options.output)
        for name, size, effect in effects(merged, written):
            found[name] = found.get(name, Effect()).plus(effect)
            bar.advance(task, size)
    others = [name for name in base.names() if name not in touched]
    kept = sum(stored_as(base, name) == stored_as(written, name) for name in others)
    written.close()
    lora = adapter.lora
    print(
        f"{adapter.folder}: {'DoRA' if lora.dora else 'LoRA'} of rank {lora.rank}, scale "
        f"{lora.scale:g}, on {', '.join(lora.targets)}: {len(touched)} of {len(base.names())} "
        f"tensors changed; of the others {kept} have the bytes they had, {len(others) - kept} are "
        f"as `ossature convert --to {options.to}` makes them"
    )
    for line in describe(report):
        print(line)
    for target in lora.targets:
        parts = [effect for name, effect in found.items() if target_of(name) == target]
        whole = Effect()
        for part in parts:
            whole = whole.plus(part)
        worst = min(part.share for part in parts)
        print(
            f"{target}: {whole.share:.1%} of the adapter's effect is in the weights written "
            f"(least {worst:.1%}), with an error of {whole.error:.1%} of it"
        )
        if whole.share < VANISHED:
            wider = "" if options.to == "bf16" else "use --to bf16, or "
            print(
                f"warning: {target}: most of what the adapter does is lost in {options.to}; "
                f"{wider}serve the adapter beside its base"
            )
    print(f"{options.output}: written")
    return 0
