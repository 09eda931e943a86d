"""MXFP4 -> BF16 -> MXFP4 of gpt-oss-20b: seconds, peak memory, and whether every bit came back.

    python benchmarks/convert.py FOLDER [--layers N] [--keep]

FOLDER is on the disk to measure; 70 GB of it are used for all 24 layers.  Each direction is
compared with plainly reading the bytes it reads and writing the bytes it writes, file by file with
fsync.  Files are dropped from the page cache before they are read, in both.  Memory is the peak
of resident memory of the converting process less that of a process that has only imported; the
page cache does not count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

LIMIT_RATIO, LIMIT_GIB = 2.5, 3.0
PIECE_BYTES = 2**26

CHILD = """
import re, sys, time
from ossature.convert import command, folder
def resident(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = resident("VmRSS")
seconds = 0.0
if len(sys.argv) > 1:
    start = time.perf_counter()
    command.convert([sys.argv[1], sys.argv[2], "--to", sys.argv[3]])
    seconds = time.perf_counter() - start
print(before, resident("VmHWM"), seconds, time.process_time())
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    options = parser.parse_args()

    from make_checkpoint import make

    folder: Path = options.folder
    source, bf16, back = folder / "mxfp4", folder / "bf16", folder / "back"
    for old in (bf16, back):
        shutil.rmtree(old, ignore_errors=True)
    if not source.exists():
        make(source, options.layers)
    try:
        good = True
        print(f"{options.layers} of 24 layers, {os.cpu_count()} cores; seconds, GB, GiB")
        print(f"{'':>14}  read  write   plain  convert  ratio  peak  cpu")
        for name, src, dst, to in (
            ("MXFP4 -> BF16", source, bf16, "bf16"),
            ("BF16 -> MXFP4", bf16, back, "mxfp4"),
        ):
            drop(src)
            seconds, peak, cpu = convert(src, dst, to)
            drop(src)
            sizes, read = size(src), read_plainly(src)
            if src == bf16:
                print(f"the BF16 folder held {', '.join(sorted(f.name for f in src.iterdir()))}")
                shutil.rmtree(src)  # room for the next
            plain = read + write_plainly(dst, folder / "plain")
            ratio, gib = seconds / plain, peak / 2**30
            good &= ratio <= LIMIT_RATIO and gib <= LIMIT_GIB
            print(
                f"{name:>14}  {sizes / 1e9:.1f}  {size(dst) / 1e9:5.1f}  {plain:6.1f}  "
                f"{seconds:7.1f}  {ratio:5.2f}  {gib:.2f}  {cpu:.0f}"
            )
        different = compare(source, back)
        print(f"back to the bit: {different or 'yes'}")
        good &= not different
    finally:
        if not options.keep:
            for path in (source, bf16, back):
                shutil.rmtree(path, ignore_errors=True)
    print("within the limits" if good else "NOT within the limits")
    return 0 if good else 1


def convert(source: Path, target: Path, to: str) -> tuple[float, int, float]:
    """Seconds, peak bytes above a process that has only imported, and seconds of CPU."""
    imported = int(child()[0])
    _, peak, seconds, cpu = child(str(source), str(target), to)
    return float(seconds), int(peak) - imported, float(cpu)


def child(*words: str) -> list[str]:
    """The four figures on the last line that a new process prints."""
    command = [sys.executable, "-c", CHILD, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1].split()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


def drop(folder: Path) -> None:
    """Out of the page cache, so that what is read comes from the disk."""
    for file in files(folder):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_plainly(folder: Path) -> float:
    start = time.perf_counter()
    buffer = bytearray(PIECE_BYTES)
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_plainly(like: Path, folder: Path) -> float:
    """Files of the sizes of those in `like`, of random bytes; each is removed when it is synced."""
    data = memoryview(os.urandom(PIECE_BYTES))
    seconds = 0.0
    folder.mkdir()
    try:
        for path in files(like):
            left = path.stat().st_size
            start = time.perf_counter()
            with (folder / path.name).open("wb", buffering=0) as file:
                while left:
                    left -= file.write(data[:left])
                os.fsync(file.fileno())
            seconds += time.perf_counter() - start
            (folder / path.name).unlink()
    finally:
        shutil.rmtree(folder)
    return seconds


def compare(one: Path, other: Path) -> str:
    """The first tensor in which two folders differ, as stored; empty if none."""
    import torch

    from ossature.checkpoint.safetensors import Reader

    a, b = Reader(one), Reader(other)
    if a.places.keys() != b.places.keys():
        return f"other tensors: {sorted(a.places.keys() ^ b.places.keys())}"
    for name, place in a.places.items():
        if place.spec != b.places[name].spec:
            return name
        rows = place.spec.shape[0]
        step = max(1, PIECE_BYTES * rows // place.spec.num_bytes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            pair = [reader.read(name, start, stop).view(torch.uint8) for reader in (a, b)]
            if not torch.equal(*pair):
                return name
    return ""


if __name__ == "__main__":
    sys.exit(main())
