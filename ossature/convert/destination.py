"""A folder, or a file, that exists whole or not at all."""

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
    with _beside(folder, expected_bytes) as (partial, final):
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        check_free(folder)
        partial.rename(final)  # onto an empty folder, or none


@contextmanager
def new_file(file: Path, expected_bytes: int = 0) -> Iterator[Path]:
    """`new_folder`, for a file; what is written to has no name that anybody reads."""
    check_no_file(file)
    with _beside(file, expected_bytes) as (partial, final):
        yield partial
        sync(partial)
        check_no_file(file)
        partial.rename(final)


def check_no_file(file: Path) -> None:
    """Refuse a destination where something is already."""
    if file.is_symlink() or file.exists():
        raise ValueError(f"{file}: is in the way; give a new file")


@contextmanager
def _beside(path: Path, expected_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A name beside the final one, and the final one; what has the first is removed on failure."""
    final = Path(os.path.abspath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if free < expected_bytes:
        raise OSError(
            f"{path}: needs {expected_bytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left"
        )
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    remove(partial)  # of a killed process that had the same number
    try:
        yield partial, final
        sync(final.parent)
    except BaseException as error:
        remove(partial)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
