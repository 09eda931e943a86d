"""Sharded weights on disk: a folder of torch.distributed.checkpoint with flat names.

A *native* folder holds `.metadata` (which tensor lies where) and `*.distcp` (their bytes).  Any
number of ranks writes it, any other number reads it: `save_weights` and `load_weights` take a dict
of tensors or DTensors and are collective when a process group exists; `read_weight` is not, and
holds one tensor.  Only tensors are stored, never other Python objects.

`.metadata` is a pickle, and a pickle from elsewhere can run code: it is read through `_Unpickler`,
which builds the few classes of torch.distributed.checkpoint and nothing else; the bytes of the
tensors are read by torch with `weights_only=True`.

Source: torch/distributed/checkpoint/{filesystem,metadata}.py of torch 2.11 - 2.13.
"""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ossature.checkpoint.box import Box

INDEX = ".metadata"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


def save_weights(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write the tensors, each rank its own parts, synced to the disk when this returns.

    Not atomic: write to a folder beside the final one, then rename.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        assert isinstance(tensor, Tensor), f"{name} is not a tensor"
    with _sentences(folder), _one_process():
        save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=_Writer(folder),
            process_group=process_group,
            no_dist=not dist.is_initialized(),
        )


def load_weights(folder: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Fill the tensors in place, each rank its own parts; values are cast to the dtype they find.

    Raises:
        ValueError: the names in the folder are not exactly those that the ranks ask for, each its
            own, or a shape differs.
    """
    stored = list_weights(folder)
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{folder}: has no tensor {name}")
        if stored[name][0] != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has shape {stored[name][0]}, expected {tuple(tensor.shape)}"
            )
    wanted = _names_of_all_ranks(tensors)
    for name in stored:
        if name not in wanted:
            raise ValueError(f"{folder}: unexpected tensor {name}")
    with _sentences(folder), _one_process():
        load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=_Reader(folder),
            no_dist=not dist.is_initialized(),
        )


def _names_of_all_ranks(tensors: Mapping[str, Tensor]) -> set[str]:
    """Pipeline ranks have different tensors."""
    if not dist.is_initialized():
        return set(tensors)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(tensors))
    return set().union(*names)


def list_weights(folder: Path | str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in a folder; reads the index alone."""
    entries = _index(Path(folder)).state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, dcp_metadata.TensorStorageMetadata)  # _index lets nothing else pass
    }


class Part(NamedTuple):
    """A box of a tensor as it is stored, with the place of what `torch.save` made of it."""

    box: Box
    file: str
    """In the folder."""
    offset: int
    length: int


def parts(folder: Path | str) -> dict[str, list[Part]]:
    """Name -> the parts in which a tensor is stored; reads the index alone.

    Raises:
        ValueError: they do not make up the whole tensor.
    """
    index = _index(Path(folder))
    found: dict[str, list[Part]] = {}
    for name, entry in index.state_dict_metadata.items():
        assert isinstance(entry, dcp_metadata.TensorStorageMetadata)
        found[name] = []
        for chunk in entry.chunks:
            place = index.storage_data.get(dcp_metadata.MetadataIndex(name, chunk.offsets))
            if place is None:
                raise ValueError(f"{folder}: {INDEX} lacks the place of a part of {name}")
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            box = tuple(slice(first, first + size) for first, size in ends)
            found[name].append(Part(box, place.relative_path, place.offset, place.length))
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"{folder}: {INDEX}: the parts of {name} do not make up the whole")
    return found


def read_weight(folder: Path | str, name: str) -> Tensor:
    """One whole tensor, in the stored dtype, by this process alone.

    Raises:
        KeyError: no tensor of this name.
    """
    shape, dtype = list_weights(folder)[name]
    tensor = torch.empty(shape, dtype=dtype)
    with _sentences(folder), _quiet():
        load({name: tensor}, storage_reader=_Reader(folder), no_dist=True)
    return tensor


def newest(run: Path | str) -> Path | None:
    """The newest whole checkpoint of a run: `run/checkpoints/step_00000100`; None if there is none.

    A checkpoint gets this name by a rename when all of it is on disk, so what has it is whole.
    """
    found = checkpoints(run)
    return found[-1] if found else None


def checkpoints(run: Path | str) -> list[Path]:
    """All whole checkpoints of a run, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step_*")
    whole = [f for f in folders if STEP_FOLDER.fullmatch(f.name) and (f / INDEX).is_file()]
    return sorted(whole, key=step_of)


def step_of(folder: Path) -> int:
    """The number of optimizer steps a checkpoint has behind it, by its name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match, f"{folder} is not named like a checkpoint"
    return int(match[1])


class _Writer(FileSystemWriter):
    def storage_meta(self) -> dcp_metadata.StorageMeta:
        # The stock one stores the absolute path of the folder: nobody's business.
        return dcp_metadata.StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # Between ranks an error travels as a pickle, which has no cause.
            raise system_error(error) or error from None


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp_metadata.Metadata:
        return _index(Path(self.path))


class _Unpickler(pickle.Unpickler):
    """Builds what an index consists of; anything else is refused before it is imported."""

    CLASSES = (
        *(("torch.distributed.checkpoint.metadata", name) for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
            "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if module.startswith("pathlib") and name.endswith("Path"):
            return lambda *parts: "/".join(parts)  # where the folder once lay: of no use here
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def _index(folder: Path) -> dcp_metadata.Metadata:
    path = folder / INDEX
    status = path.stat()  # OSError names the file
    return _read_index(folder, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _read_index(folder: Path, _time: int, _size: int) -> dcp_metadata.Metadata:
    """The checked index; the arguments after the folder make a changed file a new entry."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _Unpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not an index of tensors: {error}") from None
    if not isinstance(index, dcp_metadata.Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError(f"{path}: not an index of tensors")
    try:
        _check_index(folder, index)
    except (AttributeError, TypeError) as error:  # a field of the pickled objects is not there
        raise ValueError(f"{path}: not an index of tensors: {error}") from None
    index.storage_meta = dcp_metadata.StorageMeta()
    return index


def _check_index(folder: Path, index: dcp_metadata.Metadata) -> None:
    """Everything in it is a tensor whose bytes lie in a file of the folder."""
    path = folder / INDEX
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
            raise ValueError(f"{path}: {name} is not a tensor")
        if not isinstance(entry.properties.dtype, torch.dtype):
            raise ValueError(f"{path}: {name} has no dtype")
    sizes: dict[str, int] = {}
    for key, place in index.storage_data.items():
        if not isinstance(place, _StorageInfo):
            raise ValueError(f"{path}: not an index of tensors")
        file = place.relative_path
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{path}: {key.fqn} lies outside the folder: {file}")
        if place.transform_descriptors:
            raise ValueError(f"{path}: {key.fqn} is stored by {place.transform_descriptors}")
        if file not in sizes:
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file}: missing; {INDEX} places {key.fqn} there")
            sizes[file] = (folder / file).stat().st_size
        if place.offset + place.length > sizes[file]:
            raise ValueError(f"{folder / file}: cut short within {key.fqn}")


@contextmanager
def _sentences(folder: Path | str) -> Iterator[None]:
    """Turn torch's report of all ranks' failures into one sentence."""
    try:
        yield
    except CheckpointException as failure:
        rank, error = first_failure(failure)
        if isinstance(error, OSError):
            raise OSError(f"{folder}: rank {rank}: {error}") from failure
        if isinstance(error, pickle.UnpicklingError):  # torch would say how to load it all the same
            raise ValueError(f"{folder}: the bytes of a tensor are damaged") from failure
        raise ValueError(f"{folder}: rank {rank}: {error}") from failure


def first_failure(failure: CheckpointException) -> tuple[int, BaseException]:
    """A rank that failed, and why."""
    rank, (error, _trace) = next(iter(failure.failures.items()))
    return rank, system_error(error) or error


def system_error(error: BaseException) -> OSError | None:
    """What the operating system said, behind an error.

    When the disk is full torch fails once more, on closing its file.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """Without a process group torch warns that it takes this process for all: it is."""
    if dist.is_initialized():
        yield
    else:
        with _quiet():
            yield
