"""A folder that exists whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(folder: Path) -> None:
    """Refuse a destination that something is in already.

    Raises:
        ValueError: the folder is not empty, or a file.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is in the way; give a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; give a new folder")


@contextmanager
def new_folder(folder: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """A folder to write to, beside the final one; it gets the final name when all went well.

    Whatever ends the block otherwise, an interrupt included, removes it.

    Args:
        expected_bytes: refuse to begin where the disk has less left.
    """
    check_free(folder)
    final = Path(os.path.abspath(folder))
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if free < expected_bytes:
        raise OSError(
            f"{folder}: needs {expected_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left"
        )
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had the same number
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        check_free(folder)
        partial.rename(final)  # onto an empty folder, or none
        sync(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
