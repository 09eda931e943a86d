"""Boxes of tensors, and reading one from a file in which the tensor's numbers lie in order.

A rank that has part of a weight has a box of it: a range of every dim.  Of the file it reads the
bytes of the box and no others, in runs: the dims that are whole lie together.
"""

from __future__ import annotations

import itertools
import math
import os

import torch
from torch import Tensor

Box = tuple[slice, ...]
"""Start and stop in every dim of a tensor, both given."""


def whole(shape: tuple[int, ...]) -> Box:
    return tuple(slice(0, size) for size in shape)


def rows(shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> Box:
    """Rows [start, stop) of the first dim; all of them by default."""
    if not shape:
        return ()
    return (slice(start, shape[0] if stop is None else stop), *whole(shape[1:]))


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes of a tensor have in common."""
    pairs = zip(one, other, strict=True)
    box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
    return None if any(part.start >= part.stop for part in box) else box


def within(box: Box, outer: Box) -> Box:
    """The same box, counted from the corner of another that holds it."""
    pairs = zip(box, outer, strict=True)
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in pairs)


def pieces(box: Box, most: int) -> list[Box]:
    """The box, cut along its first dim into boxes of at most `most` numbers; one row at least."""
    if not box or math.prod(shape_of(box)) == 0:
        return [] if box else [box]
    first, *rest = box
    step = max(1, most // math.prod(shape_of(tuple(rest))))
    starts = range(first.start, first.stop, step)
    return [(slice(start, min(start + step, first.stop)), *rest) for start in starts]


def read_box(
    handle: int, offset: int, dtype: torch.dtype, shape: tuple[int, ...], box: Box, what: str
) -> Tensor:
    """A box of the tensor of this dtype and shape that begins at byte `offset` of an open file.

    Args:
        what: the file and the tensor, for the sentence of an error.

    Raises:
        ValueError: the file ends within the box.
    """
    for part, size in zip(box, shape, strict=True):
        assert 0 <= part.start <= part.stop <= size, f"{what}: {box} of {shape}"
    out = torch.empty(shape_of(box), dtype=dtype)
    if not out.numel():
        return out
    cut = len(shape)  # dims from here on are whole
    while cut > 1 and box[cut - 1] == slice(0, shape[cut - 1]):
        cut -= 1
    strides = [math.prod(shape[dim + 1 :]) * dtype.itemsize for dim in range(len(shape))]
    first = offset + sum(part.start * step for part, step in zip(box, strides, strict=True))
    buffer = bytes_of(out)
    outer = range(max(cut - 1, 0))
    length = len(buffer) // math.prod(out.shape[dim] for dim in outer)
    steps = itertools.product(*(range(0, out.shape[d] * strides[d], strides[d]) for d in outer))
    for number, step in enumerate(steps):
        run = buffer[number * length : (number + 1) * length]
        _read_into(handle, run, first + sum(step), what)
    return out


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_into(handle: int, buffer: memoryview, offset: int, what: str) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(handle, [buffer[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{what}: the file was cut short while it was read")
        done += count
