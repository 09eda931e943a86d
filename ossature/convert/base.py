"""Which model the adapter of a checkpoint belongs to: base.json, beside weights that are adapters.

The base is known by its folder and by its identity, a hash of samples of its files: it tells one
fine-tuned model from another in well under a second, whatever their size.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ossature.config import LoraConfig
from ossature.convert.config import read_json
from ossature.convert.folder import BASE as BASE
from ossature.convert.folder import resolve

SAMPLES, SAMPLE_BYTES = 256, 4096
"""Of each file; one of up to a mebibyte is read whole."""


@dataclass(frozen=True)
class Base:
    """What base.json says."""

    folder: str
    """Empty for random weights, drawn from `seed`."""
    identity: str
    seed: int
    packed: bool
    """Whether the adapter was trained on experts in MXFP4."""
    quantized: bool
    """Whether they had to be rounded to it."""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def base_of(lora: LoraConfig, init: Path | None, seed: int) -> Base:
    """The base of a run that starts from `init`."""
    known = ("", "") if init is None else (os.path.abspath(init), identity(init))
    return Base(*known, seed, lora.base == "mxfp4", lora.quantize_base)


def read_base(folder: Path) -> Base | None:
    """Of a checkpoint; None if it holds a whole model.

    Raises:
        ValueError: base.json is damaged, or not of this version.
    """
    path = folder / BASE
    if not path.is_file():
        return None
    data = read_json(path)
    names = {entry.name for entry in fields(Base)}
    for key in sorted(names ^ data.keys()):
        raise ValueError(f"{path}: {'lacks' if key in names else 'has an unknown key'} {key}")
    for entry in fields(Base):
        if type(data[entry.name]).__name__ != entry.type:
            raise ValueError(
                f"{path}: {entry.name} ({data[entry.name]!r}) must be of type {entry.type}"
            )
    return Base(**data)


def check_base(folder: Path, base: Base, found: Path | None) -> None:
    """Refuse to go on, from the checkpoint `folder`, with another base than it was trained on."""
    if ("" if found is None else identity(found)) != base.identity:
        raise ValueError(
            f"{folder}: its adapter was trained on {base.folder or 'random weights'}, and "
            f"{found or 'random weights'} are others"
        )


def identity(folder: Path | str) -> str:
    """Of the weights in a folder, by their files: the same for copies, another after a change."""
    digest = hashlib.blake2b(digest_size=16)
    folder = resolve(folder)
    kinds = (".safetensors", ".distcp")
    in_folder = [] if folder.is_file() else sorted(folder.iterdir())
    for path in [p for p in in_folder if p.suffix in kinds] or [folder]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb", buffering=0) as file:
            for start in range(0, size, max(SAMPLE_BYTES, size // SAMPLES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
