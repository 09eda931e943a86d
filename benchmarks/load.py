"""Bytes each rank reads to load a folder onto its shards: time, peak memory, share of the folder.

    python benchmarks/load.py FOLDER [--layers N] [--format FORMAT] [--layouts tp=2 ep=4 ...]

FOLDER gets gpt-oss-20b in MXFP4 with N layers (benchmarks/make_checkpoint.py), and beside it, for
another format, what that is converted to; both are removed at the end, unless --keep.  A layout is
axes joined by commas; its number of ranks is the product, of all axes but ep and etp, or --ranks.
Bytes are what the kernel counts for the process (rchar in /proc/self/io), all files together.
Memory is the peak of resident memory above that after imports; files are dropped from the page
cache before.  All ranks run at once, so on few cores the time is that of all of them together.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ossature.config import ParallelConfig
from ossature.convert.folder import open_source, write_folder
from ossature.convert.open import open_model
from ossature.parallel.gradients import local
from ossature.parallel.launch import launched
from ossature.parallel.spawn import run_ranks

LAYOUTS = ["tp=2", "ep=4", "dp_shard=4", "pp=2", "tp=2,ep=4,dp_shard=2"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--format", choices=("mxfp4", "bf16", "openai", "native"), default="mxfp4")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    options = parser.parse_args()

    from convert import drop
    from make_checkpoint import make

    source, folder = options.folder / "mxfp4", options.folder / options.format
    try:
        if not source.exists():
            make(source, options.layers)
        if not folder.exists():
            write_folder(open_source(source), folder, options.format)
        whole = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{options.layers} layers, {options.format}: {whole / 1e9:.2f} GB; GB, GiB, seconds")
        print(f"{'layout':>22}  ranks  read: least  most  share of the folder  weights  peak  time")
        for text in options.layouts:
            axes = {name: int(size) for name, size in (a.split("=") for a in text.split(","))}
            drop(folder)
            ranks = run_ranks(number_of_ranks(axes), load, folder, axes, seconds=3000)
            read, held, peak, seconds = zip(*ranks, strict=True)
            print(
                f"{text:>22}  {len(ranks):5}  {min(read) / 1e9:11.2f}  {max(read) / 1e9:4.2f}  "
                f"{max(read) / whole:19.1%}  {max(held) / 2**30:7.2f}  {max(peak) / 2**30:4.2f}  "
                f"{max(seconds):4.0f}"
            )
    finally:
        if not options.keep:
            for path in {source, folder}:
                shutil.rmtree(path, ignore_errors=True)
    return 0


def number_of_ranks(axes: dict[str, int]) -> int:
    """The experts' axes borrow ranks of the others; alone they need as many themselves."""
    dense = math.prod(size for axis, size in axes.items() if axis not in ("ep", "etp"))
    return max(dense, axes.get("ep", 1) * axes.get("etp", 1) * axes.get("pp", 1))


def load(rank: int, world: int, folder: Path, axes: dict[str, int]) -> tuple[int, int, int, float]:
    """Bytes read, bytes of weights held, peak bytes above imports, seconds."""
    with launched() as ranks:
        dist.barrier()
        before, imported, start = read_bytes(), resident("VmRSS"), time.perf_counter()
        model = open_model(folder, ParallelConfig(**axes), torch.bfloat16, ranks)
        seconds = time.perf_counter() - start
        held = sum(local(p.detach()).nbytes for p in model.parameters())
        return read_bytes() - before, held, resident("VmHWM") - imported, seconds


def read_bytes() -> int:
    return _number("/proc/self/io", "rchar")


def resident(key: str) -> int:
    return _number("/proc/self/status", key) * 1024


def _number(file: str, key: str) -> int:
    match = re.search(rf"{key}:\s+(\d+)", Path(file).read_text())
    assert match
    return int(match[1])


if __name__ == "__main__":
    sys.exit(main())
