"""Checkpoints written by several ranks -> Hugging Face and back: peak memory, and every bit.

    python benchmarks/convert_sharded.py FOLDER [--layers N] [--dtype bf16|fp32] [--layouts ...]

FOLDER gets gpt-oss-20b in MXFP4 with N layers (benchmarks/make_checkpoint.py).  For each layout
the ranks load it onto their shards and write a sharded checkpoint, as training does.  One process
converts that to Hugging Face's bfloat16, and that back to a native folder; another to MXFP4.
Memory is the peak of resident memory of the converting process above that of one that has only
imported.  All are compared with the start, tensor by tensor.  Files are removed as soon as they
are not needed: about 12 GB of disk for one layer in fp32.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ossature.checkpoint.store import save_weights
from ossature.config import ParallelConfig
from ossature.convert.config import hugging_face_config
from ossature.convert.folder import open_source
from ossature.convert.hugging_face import write_json
from ossature.convert.open import open_model
from ossature.convert.verify import differences
from ossature.parallel.launch import launched
from ossature.parallel.spawn import run_ranks

LAYOUTS = ["dp_shard=4", "tp=2,ep=4,dp_shard=2"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    options = parser.parse_args()

    from convert import child, convert
    from load import number_of_ranks
    from make_checkpoint import make

    folder: Path = options.folder
    source, sharded, bf16 = folder / "mxfp4", folder / "sharded", folder / "bf16"
    good = True
    child()  # compiles what is imported
    try:
        make(source, options.layers)
        start = open_source(source)
        largest = max(torch.Size(start.spec(n).shape).numel() for n in start.names())
        size = DTYPES[options.dtype].itemsize
        whole = sum(torch.Size(start.spec(n).shape).numel() for n in start.names())
        print(f"{options.layers} layers, {options.dtype}: {gib(whole * size)} GiB in all, ", end="")
        print(f"the largest tensor {gib(largest * size)} GiB")
        print(f"{'written by':>22}  {'direction':>16}  peak GiB  seconds  equal")
        for text in options.layouts:
            axes = {name: int(n) for name, n in (a.split("=") for a in text.split(","))}
            world = number_of_ranks(axes)
            run_ranks(world, write, source, sharded, axes, options.dtype, seconds=3000)
            for one, to, other in [
                (sharded, "mxfp4", folder / "again"),
                (sharded, "bf16", bf16),
                (bf16, "native", folder / "back"),
            ]:
                seconds, peak, _ = convert(one, other, to)
                equal = not any(d.weights for d in differences(start, open_source(other)))
                good &= equal
                way = f"{'native' if one == sharded else 'bf16'} -> {to}"
                print(f"{text:>22}  {way:>16}  {gib(peak):>8}  {seconds:7.0f}  {equal}")
                shutil.rmtree(other if other != bf16 else sharded)
            shutil.rmtree(bf16)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def write(rank: int, world: int, source: Path, target: Path, axes: dict, dtype: str) -> None:
    """What a run's checkpoint has of weights, from this rank's shards."""
    with launched() as ranks:
        model = open_model(source, ParallelConfig(**axes), DTYPES[dtype], ranks)
        save_weights(target, dict(model.named_parameters()))
        if ranks.first:
            write_json(target / "config.json", hugging_face_config(model.config))
        dist.barrier()


if __name__ == "__main__":
    sys.exit(main())
