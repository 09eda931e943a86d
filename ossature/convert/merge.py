"""Adapters -> the weights they belong to: W' = W + scale B A, in fp32, some rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ossature.checkpoint.box import Box
from ossature.checkpoint.safetensors import Spec
from ossature.convert.adapters import ENDS, Adapter, parameter
from ossature.convert.layout import Format
from ossature.convert.source import Source
from ossature.convert.transfer import is_packed, jobs
from ossature.kernels.mxfp4 import dequantize, quantize


class MergedSource:
    """The weights of a base with an adapter merged in; what it does not touch is as it was.

    A is kept from piece to piece of a weight: pieces of a weight are read one after the other.
    """

    def __init__(self, base: Source, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.folder: Path = base.folder
        self.format: Format = base.format
        self.config = base.config
        self.files = base.files
        self._last: tuple[str, tuple[Tensor, Tensor, Tensor | None]] | None = None
        self._norms: Tensor | None = None
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return self.base.names()

    def touches(self, name: str) -> bool:
        return parameter(name, "lora_a") in self.adapter.shapes

    def spec(self, name: str) -> Spec:
        spec = self.base.spec(name)
        return Spec(torch.float32, spec.shape) if self.touches(name) else spec

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        weight = self.base.read(name, start, stop)
        if not self.touches(name):
            return weight
        change = self.change(name, weight, start)
        return weight.float() + change

    def part(self, name: str, box: Box) -> Tensor:
        first, *rest = box  # norms are of whole rows
        return self.read(name, first.start, first.stop)[(slice(None), *rest)]

    def change(self, name: str, weight: Tensor, start: int) -> Tensor:
        """W' - W in fp32, of rows of the first dim that begin at `start`."""
        a, b, magnitude = self._parameters(name)
        scale, rows = self.adapter.lora.scale, slice(start, start + len(weight))
        wide = weight.float()
        if name == "embedding.weight":  # its matrix is (hidden, vocab): rows here are columns
            change = scale * (b @ a[:, rows]).mT
            if magnitude is None:
                return change
            return (wide + change) * (magnitude / self._embedding_norms()) - wide
        change = scale * (b[rows] @ (a[rows] if a.dim() == 3 else a))  # experts have their own A
        if magnitude is None:
            return change
        whole = wide + change
        norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
        return whole * (magnitude[rows][..., None] / _not_zero(norm)) - wide

    def _parameters(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        with self._lock:
            if self._last is None or self._last[0] != name:
                found = self.adapter.of(name)
                assert found is not None, name
                a, b, magnitude = found
                for end, tensor in zip(ENDS, found, strict=True):
                    if tensor is not None and not tensor.isfinite().all():
                        raise ValueError(
                            f"{self.adapter.folder}: {parameter(name, end)} has numbers that are "
                            "not finite"
                        )
                wide = None if magnitude is None else magnitude.float()
                self._last = name, (a.float(), b.float(), wide)
            return self._last[1]

    def _embedding_norms(self) -> Tensor:
        """Of the rows of (hidden, vocab), added up over the vocabulary."""
        with self._lock:
            if self._norms is not None:
                return self._norms
        a, b, _ = self._parameters("embedding.weight")
        squares, step = torch.zeros(len(b), dtype=torch.float64), 8192
        for start in range(0, a.shape[1], step):
            rows = slice(start, start + step)
            weight = self.base.read(
                "embedding.weight", start, min(start + step, a.shape[1])
            ).float()
            squares += (
                (weight + self.adapter.lora.scale * (b @ a[:, rows]).mT).double().square().sum(0)
            )
        with self._lock:
            self._norms = _not_zero(squares.sqrt().float())
            return self._norms

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        return None if self.touches(name) else self.base.packed(name, start, stop)

    def close(self) -> None:
        self.base.close()


def _not_zero(norm: Tensor) -> Tensor:
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)


class Effect(NamedTuple):
    """What of an adapter's change of a weight is in the folder that was written."""

    asked: float = 0.0
    """Sum of the squares of the change."""
    found: float = 0.0
    """Inner product of the change with what changed on disk."""
    missed: float = 0.0
    """Sum of the squares of the difference of the two."""

    @property
    def share(self) -> float:
        """1 if the change is there, 0 if the weight is as before (or has changed otherwise)."""
        return self.found / self.asked if self.asked else 1.0

    @property
    def error(self) -> float:
        """Norm of what is missing or wrong, over the norm of the change."""
        return (self.missed / self.asked) ** 0.5 if self.asked else 0.0

    def plus(self, other: Effect) -> Effect:
        return Effect(*(a + b for a, b in zip(self, other, strict=True)))


def effects(merged: MergedSource, written: Source) -> Iterator[tuple[str, int, Effect]]:
    """Of every piece of every weight that the adapter touches: name, bytes read, effect.

    What was written in MXFP4 is compared with the base in MXFP4: what rounding does to the base
    alone is no effect of the adapter.
    """
    for name, start, stop in jobs(merged.base):
        if not merged.touches(name):
            continue
        before = merged.base.read(name, start, stop)
        asked = merged.change(name, before, start)
        if is_packed(written, name) and not is_packed(merged.base, name):
            without = dequantize(*quantize(before))
        else:
            without = before
        found = written.read(name, start, stop).float() - without.float()
        sums = Effect()
        for a, f in zip(asked, found, strict=True):  # an expert, or a row, at a time
            a, f = a.double(), f.double()
            squares = a.square().sum().item(), (a * f).sum().item(), (f - a).square().sum().item()
            sums = sums.plus(Effect(*squares))
        yield name, before.nbytes, sums
