"""Fabricate gpt-oss-20b in MXFP4: real names, shapes and files, random weights, 13.8 GB.

    python benchmarks/make_checkpoint.py FOLDER [--layers N]

The files are dealt, named and laid out as published (numbered from 0, "of" the last number), down
to their sizes in bytes; with all 24 layers the index is compared with the published one by hash.
Blocks are canonical: the largest code of a group is 6 or 7, scale bytes lie in 110...125.  Norms,
biases and the like are normal numbers, so that nothing is a constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import torch

from ossature.checkpoint.safetensors import INDEX, Spec, Writer
from ossature.convert.destination import new_folder
from ossature.convert.hugging_face import write_configs
from ossature.convert.layout import layout, specs
from ossature.convert.names import rows
from ossature.model.config import GPT_OSS_20B, ModelConfig

MAX_SHARD_BYTES = 4_800_000_000
PUBLISHED_INDEX = "0e085b977c4c9942f85938828e8c989ed7d5cdabf852e4da6a67c116cd502cd1"
PUBLISHED_BYTES = [4792272488, 4798702184, 4170342232]
PIECE_BYTES = 2**26


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    make(options.folder, options.layers, options.seed)
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")
    return 0


def make(folder: Path, layers: int = 24, seed: int = 0) -> None:
    config = dataclasses.replace(GPT_OSS_20B, num_hidden_layers=layers, layer_types=())
    tensors = in_published_order(config)
    generator = torch.Generator().manual_seed(seed)
    with new_folder(folder, sum(spec.num_bytes for spec in tensors.values())) as partial:
        writer = Writer(partial, tensors, MAX_SHARD_BYTES, published_name, metadata=None)
        try:
            for name, spec in tensors.items():
                write_random(writer, name, spec, generator)
            writer.finish()
        finally:
            writer.close()
        write_configs(partial, config, "mxfp4")
    if layers == 24:
        check(folder)


def in_published_order(config: ModelConfig) -> dict[str, Spec]:
    """Stored name -> dtype and shape, in the order in which the files were filled."""
    places, spec_of = layout(config, "mxfp4"), specs(config, "mxfp4")
    ordered = sorted(rows(config).values(), key=lambda row: (row.original, row.fused))
    return {name: spec_of[name] for row in ordered for name in places[row.native].names}


def published_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count - 1:05d}.safetensors"


def write_random(writer: Writer, name: str, spec: Spec, generator: torch.Generator) -> None:
    step = max(1, PIECE_BYTES * spec.shape[0] // spec.num_bytes)
    for start in range(0, spec.shape[0], step):
        shape = (min(step, spec.shape[0] - start), *spec.shape[1:])
        if name.endswith("_scales"):
            rows = torch.randint(110, 126, shape, dtype=torch.uint8, generator=generator)
        elif name.endswith("_blocks"):
            words = torch.empty((*shape[:-1], 2), dtype=torch.int64)
            words.random_(-(2**63), None, generator=generator)
            rows = words.view(torch.uint8)
            rows[..., 0] |= 6  # the largest code of every group is 6 or 7
        else:
            rows = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        writer.write(name, rows, start)


def check(folder: Path) -> None:
    """That files and index are those of the published checkpoint."""
    index = json.dumps(json.loads((folder / INDEX).read_text()))
    assert hashlib.sha256(index.encode()).hexdigest() == PUBLISHED_INDEX, "another index"
    sizes = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
    assert sizes == PUBLISHED_BYTES, f"files of {sizes} bytes"


if __name__ == "__main__":
    sys.exit(main())
