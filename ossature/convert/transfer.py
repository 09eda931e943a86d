"""Weights from a source to safetensors, in pieces: several are made while one is written.

A piece is some rows of one weight, tens of megabytes.  Threads read and recode pieces; the thread
that called writes them, in order.  What is held at a time is a few pieces, whatever the size of
the model.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ossature.checkpoint.safetensors import Writer
from ossature.convert.layout import Published, Stored, layout
from ossature.convert.source import Source
from ossature.kernels import mxfp4

PIECE_BYTES = 2**25
"""Of a piece in bfloat16; one expert's matrix at least.  Larger buffers are given back to the
system each time, and filling them with fresh pages costs as much as recoding them."""
ERROR_PIECE = 2**20
"""Numbers whose error is found at a time, in float64."""
MOST_WORKERS = 8
Job = TypeVar("Job")
Made = TypeVar("Made")


@dataclass
class Report:
    """What a conversion did to numbers."""

    recoded: int = 0
    """Matrices of experts that were quantised."""
    inexact: dict[str, Error] = field(default_factory=dict)
    """Those that changed by it."""
    cast: dict[str, int] = field(default_factory=dict)
    """dtype -> weights that were rounded from it to bfloat16."""


class Error(NamedTuple):
    """Of a quantised weight, added up over its pieces."""

    squares: float = 0.0
    """Sum of the squares of the differences."""
    of_squares: float = 0.0
    """Sum of the squares of the numbers."""
    largest: float = 0.0
    """Largest difference."""

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the weight."""
        return math.sqrt(self.squares / self.of_squares) if self.of_squares else 0.0

    def plus(self, other: Error) -> Error:
        largest = max(self.largest, other.largest)
        return Error(self.squares + other.squares, self.of_squares + other.of_squares, largest)


class Piece(NamedTuple):
    parts: list[tuple[str, Tensor]]
    """Stored names and the rows of each."""
    first: int
    """Row of the stored tensors at which they belong."""
    error: Error | None
    """Of a quantised piece that is not exact."""


def transfer(
    source: Source,
    writer: Writer,
    format: Published,
    scales: Source | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Report:
    """Write every weight of a source in a published format.

    Args:
        scales: an MXFP4 folder of the same shape; its scales are kept where they hold the weights
            exactly.
        advance: called with the number of bytes of every piece that is written.
    """
    report = Report()
    places = layout(source.config, format)

    def make(job: tuple[str, int, int]) -> Piece:
        return recode(source, scales, places[job[0]], *job)

    for (name, start, _), piece in in_order(make, jobs(source)):
        for stored, tensor in piece.parts:
            writer.write(stored, tensor, piece.first)
            advance(tensor.nbytes)
        kind, dtype = places[name].kind, source.spec(name).dtype
        if start == 0 and kind == "packed" and not is_packed(source, name):
            report.recoded += 1
        elif start == 0 and dtype != torch.bfloat16:
            key = str(dtype).removeprefix("torch.")
            report.cast[key] = report.cast.get(key, 0) + 1
        if piece.error is not None:
            report.inexact[name] = report.inexact.get(name, Error()).plus(piece.error)
    return report


def is_packed(source: Source, name: str) -> bool:
    return source.packed(name, 0, 0) is not None


def jobs(source: Source) -> Iterator[tuple[str, int, int]]:
    """Every weight, cut into runs of rows: name, first row, row after the last."""
    for name in source.names():
        rows, *rest = source.spec(name).shape
        step = max(1, PIECE_BYTES // (2 * math.prod(rest)))
        for start in range(0, rows, step):
            yield name, start, min(start + step, rows)


def recode(
    source: Source, scales: Source | None, stored: Stored, name: str, start: int, stop: int
) -> Piece:
    """Rows of a weight as the target stores them."""
    pair = source.packed(name, start, stop)
    if stored.kind == "packed":
        error = None
        if pair is None:
            weight = source.read(name, start, stop)
            old = None if scales is None else scales.packed(name, start, stop)
            try:
                pair, error = quantize(weight, None if old is None else old[1])
            except ValueError as refused:
                raise ValueError(f"{source.folder}: {name}: {refused}") from None
        return Piece(list(zip(stored.names, pair, strict=True)), start, error)
    if pair is not None and stored.kind == "turned":
        weight = mxfp4.dequantize_transposed(*pair)
    else:
        weight = source.read(name, start, stop) if pair is None else mxfp4.dequantize(*pair)
        weight = weight.mT if stored.kind == "turned" else weight
    weight = weight.to(torch.bfloat16).contiguous()
    return Piece([(stored.names[0], weight)], stored.first + start, None)


def quantize(weight: Tensor, scales: Tensor | None) -> tuple[tuple[Tensor, Tensor], Error | None]:
    """Blocks and scales of experts' matrices, and what they miss; None if nothing."""
    if weight.mT.is_contiguous():  # as Hugging Face stores it
        pair = mxfp4.quantize_transposed(weight.mT, scales)
        back, weight = mxfp4.dequantize_transposed(*pair), weight.mT
    else:
        pair = mxfp4.quantize(weight, scales)
        back = mxfp4.dequantize(*pair)
    if weight.dtype == torch.bfloat16 and torch.equal(
        weight.view(torch.int16), back.view(torch.int16)
    ):
        return pair, None
    error = Error()
    step = max(1, ERROR_PIECE // weight.shape[-1])
    parts = (matrix.flatten(0, -2).split(step) for matrix in (back, weight))
    for ours, theirs in zip(*parts, strict=True):
        wide = theirs.double()
        difference = ours.double() - wide
        squares = difference.square().sum().item()
        largest = difference.abs().max().item() if difference.numel() else 0.0
        error = error.plus(Error(squares, wide.square().sum().item(), largest))
    return pair, error if error.largest else None


def in_order(make: Callable[[Job], Made], jobs: Iterator[Job]) -> Iterator[tuple[Job, Made]]:
    """`make(job)` of each job, made by threads a few jobs ahead, given in order."""
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    ahead: deque[tuple[Job, Future[Made]]] = deque()
    with one_thread_each(workers) as pool:
        for job in jobs:
            ahead.append((job, pool.submit(make, job)))
            if len(ahead) > workers + 1:
                first, made = ahead.popleft()
                yield first, made.result()
        while ahead:
            first, made = ahead.popleft()
            yield first, made.result()


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch does not start more of its own: they would wait on each other."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="recode", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
