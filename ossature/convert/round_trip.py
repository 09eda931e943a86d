"""A folder onto the shards of several ranks and back into a folder, to be compared with it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ossature.checkpoint.store import save_weights
from ossature.config import ParallelConfig
from ossature.convert.config import hugging_face_config
from ossature.convert.destination import check_free
from ossature.convert.folder import open_source, size_bytes, write_folder
from ossature.convert.hugging_face import write_json
from ossature.convert.open import open_model
from ossature.convert.source import Source
from ossature.parallel.launch import Ranks


@contextmanager
def written_back(
    source: Source, parallel: ParallelConfig, ranks: Ranks, output: Path | None
) -> Iterator[Path]:
    """The folder that the ranks write from their shards, in the format of the source.

    Every rank reads its own parts, in the dtype they are stored in; all write a sharded checkpoint
    together; from that the first rank writes the folder, some rows at a time.  MXFP4 keeps the
    scales of the source where they hold the numbers exactly, as `convert --source` does.

    Args:
        output: where the folder stays; None removes it at the end.  Its disk is one that all
            ranks see.

    Raises:
        ValueError: the axes do not fit the model, or something is in `output`.
        OSError: the disk has too little room.
    """
    if output is not None:
        check_free(output)
    with _shared_folder(ranks, output) as work:
        model = open_model(source.folder, parallel, None, ranks)
        if ranks.first:
            _check_room(source, work)
        save_weights(work / "sharded", dict(model.named_parameters()))
        del model
        target = output or work / "back"
        if ranks.first:
            write_json(work / "sharded" / "config.json", hugging_face_config(source.config))
            sharded = open_source(work / "sharded")
            scales = source if source.format in ("mxfp4", "openai") else None
            try:
                write_folder(sharded, target, source.format, scales=scales)
            finally:
                sharded.close()
            shutil.rmtree(work / "sharded")
        dist.barrier()
        yield target
        dist.barrier()  # nobody still reads what is removed now


@contextmanager
def _shared_folder(ranks: Ranks, output: Path | None) -> Iterator[Path]:
    """A folder that the first rank makes, beside the output if there is one, and removes again."""
    name: list[str] = [""]
    if ranks.first:
        if output is not None:
            output.absolute().parent.mkdir(parents=True, exist_ok=True)
        parent = None if output is None else output.absolute().parent
        prefix = "ossature-" if output is None else f"{output.name}.partial-"
        name[0] = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        dist.broadcast_object_list(name, src=0)
        yield Path(name[0])
    finally:
        if ranks.first:
            shutil.rmtree(name[0], ignore_errors=True)


def _check_room(source: Source, work: Path) -> None:
    needed = size_bytes(source, "native") + size_bytes(source, source.format)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise OSError(
            f"{work.parent}: needs {needed / 1e9:.1f} GB for a while, the disk has "
            f"{free / 1e9:.1f} GB left; --output takes another disk"
        )
