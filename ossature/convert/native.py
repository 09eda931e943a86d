"""Native folders: torch.distributed.checkpoint with flat names and a config.json beside it.

Reading holds what is asked for, writing one tensor at a time: the planner of torch's writer is
asked for a tensor when its turn has come, and only then reads it from the source.

Source: torch/distributed/checkpoint/{filesystem,default_planner}.py of torch 2.11 - 2.13.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save

from ossature.checkpoint.box import Box, rows
from ossature.checkpoint.safetensors import Spec
from ossature.checkpoint.store import INDEX, first_failure, list_weights, read_weight
from ossature.checkpoint.stored import StoredReader
from ossature.convert.config import hugging_face_config, read_config
from ossature.convert.hugging_face import write_json
from ossature.convert.layout import Format
from ossature.convert.names import UnknownTensor, shapes, unknown_sentence
from ossature.convert.source import FLOATS, Source, carried_files, missing_sentence, word

OPTIMIZER = "optimizer"
"""Folder within the checkpoint of a run; the balancing biases of its routers are in there."""
BALANCE = ".moe.router.balance_bias"


class NativeSource:
    """A native folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.format: Format = "native"
        self.config = read_config(folder / "config.json")
        self.files = carried_files(folder)
        self._shapes = shapes(self.config)
        self._reader = StoredReader(folder)
        stored = self._reader.specs.items()
        self._specs = {n: Spec(dtype, shape) for n, (shape, dtype) in stored}
        self._specs = {n: s for n, s in self._specs.items() if not n.endswith(BALANCE)}
        self._check()

    def _check(self) -> None:
        unknown = [name for name in self._specs if name not in self._shapes]
        if unknown:
            raise UnknownTensor(f"{self.folder}: {unknown_sentence(unknown)}")
        missing = [name for name in self._shapes if name not in self._specs]
        if missing:
            raise ValueError(f"{self.folder}: {missing_sentence(missing)}")
        for name, (dtype, shape) in self._specs.items():
            if shape != self._shapes[name]:
                raise ValueError(
                    f"{self.folder}: {name} has shape {shape}, config.json makes it "
                    f"{self._shapes[name]}"
                )
            if dtype not in FLOATS:
                raise ValueError(f"{self.folder}: {name} has dtype {word(dtype)}, not bfloat16")

    def names(self) -> list[str]:
        return list(self._shapes)

    def spec(self, name: str) -> Spec:
        return self._specs[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.part(name, rows(self._shapes[name], start, stop))

    def part(self, name: str, box: Box) -> Tensor:
        return self._reader.box(name, box)

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return None

    def close(self) -> None:
        self._reader.close()

    def balance_biases(self) -> dict[str, Tensor]:
        """Balancing biases of routers that are not zero, beside the weights or the optimizer."""
        folders = [self.folder]
        if (self.folder / OPTIMIZER / INDEX).is_file():
            folders.append(self.folder / OPTIMIZER)
        found: dict[str, Tensor] = {}
        for folder in folders:
            for name in list_weights(folder):
                if name.endswith(BALANCE) and bool((bias := read_weight(folder, name)).any()):
                    found[name] = bias
        return found


def balance_sentence(name: str) -> str:
    return (
        f"{name} is not zero, and no format has a place for it: train until "
        "router.bias_anneal_steps have brought it to zero"
    )


def write_native(source: Source, folder: Path, advance: Callable[[int], None]) -> None:
    """Write every weight of a source in the dtype it has."""
    planner = _LazyPlanner(source, advance)
    tensors = {
        name: torch.empty(source.spec(name).shape, dtype=source.spec(name).dtype, device="meta")
        for name in source.names()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # A file per tensor: within one file torch's writer holds on to all it has written.
        writer = _Writer(folder, single_file_per_rank=False)
        try:
            save(tensors, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as failure:  # it wraps whatever ended it, interrupts too
            raise first_failure(failure)[1] from failure
    write_json(folder / "config.json", hugging_face_config(source.config, _dtype(source)))


def _dtype(source: Source) -> str:
    """That of most numbers."""
    count: dict[torch.dtype, int] = {}
    for name in source.names():
        dtype, shape = source.spec(name)
        count[dtype] = count.get(dtype, 0) + math.prod(shape)
    return word(max(count, key=lambda dtype: count[dtype]))


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # The stock one stores the absolute path of the folder: nobody's business.
        return StorageMeta()


class _LazyPlanner(DefaultSavePlanner):
    def __init__(self, source: Source, advance: Callable[[int], None]) -> None:
        super().__init__()
        self.source, self.advance = source, advance

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self.source.read(index.fqn).contiguous()
        self.advance(tensor.nbytes)
        return tensor
