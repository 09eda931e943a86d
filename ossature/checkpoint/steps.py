"""Checkpoints of a run: whole or not there, the newest few kept, written now or in the background.

RUN/checkpoints/step_00000100/
    .metadata *.distcp     weights, a native folder (`ossature.checkpoint.store`)
    optimizer/             moments and step counts, the same format
    config.json ...        small files, such as the model's shape and the tokenizer
    state.json             where the run stood

All of it is written to `step_00000100.partial`, synced, and renamed: a process may be killed at
any moment and what bears the final name is whole.  Old checkpoints lose that name before their
files go, for the same reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ossature.checkpoint.store import checkpoints, save_weights

OPTIMIZER = "optimizer"
PARTIAL = ".partial"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


class Saver:
    """Writes the checkpoints of one run.  Every rank has one and makes the same calls.

    Args:
        keep: newest checkpoints that stay; 0 keeps all.
        asynchronous: `save` returns when the tensors are copied to host memory.
    """

    def __init__(self, run: Path, keep: int, asynchronous: bool) -> None:
        self.run, self.keep = run, keep
        self.group: Any = None
        self.thread: ThreadPoolExecutor | None = None
        self.pending: Future[None] | None = None
        if asynchronous:
            # A group of its own: the loop goes on talking over the others meanwhile.
            self.group = dist.new_group(backend="gloo")
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if dist.get_rank() == 0:
            for left in (run / "checkpoints").glob(f"*{PARTIAL}"):  # by a run that was killed
                shutil.rmtree(left)

    def save(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        files: Mapping[str, bytes],
    ) -> None:
        """Write the checkpoint of `step`; one that is there already stays as it is.

        Raises:
            OSError: this checkpoint, or one written in the background before, could not be
                written; nothing is left under its name.
        """
        self.wait()
        if folder_of(self.run, step).exists():
            return
        if self.thread is None:
            self._write(step, weights, optimizer, files)
            return
        self.pending = self.thread.submit(
            self._write, step, _copied(weights), _copied(optimizer), dict(files)
        )

    def wait(self) -> None:
        """Until nothing is being written in the background; raises what went wrong there."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(wait=True)

    def _write(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        files: Mapping[str, bytes],
    ) -> None:
        final = folder_of(self.run, step)
        partial = final.with_name(final.name + PARTIAL)
        first = dist.get_rank() == 0
        try:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier(group=self.group)
            save_weights(partial / OPTIMIZER, optimizer, self.group)
            save_weights(partial, weights, self.group)
            # The first rank has gathered every rank's report of what it wrote: all is on disk.
            if first:
                for name, content in files.items():
                    _write_synced(partial / name, content)
                _sync_folder(partial / OPTIMIZER)
                _sync_folder(partial)
                partial.rename(final)
                _sync_folder(final.parent)
        except BaseException:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if first and self.keep:
            for old in checkpoints(self.run)[: -self.keep]:
                gone = old.rename(old.with_name(old.name + PARTIAL))
                shutil.rmtree(gone)
        dist.barrier(group=self.group)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, sharded as they were: training goes on changing the originals."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
