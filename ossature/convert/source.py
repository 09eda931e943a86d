"""Weights of a checkpoint under their native names, whatever its format, some rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ossature.checkpoint.box import Box, rows
from ossature.checkpoint.safetensors import Reader, Spec
from ossature.convert.layout import Format, Published, Stored, layout, specs
from ossature.convert.names import UnknownTensor, shapes, unknown_sentence
from ossature.kernels.mxfp4 import GROUP, NOT_A_NUMBER, dequantize
from ossature.model.config import ModelConfig

CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Small files that go along with the weights from folder to folder."""
FLOATS = (torch.bfloat16, torch.float32, torch.float16)


@runtime_checkable
class Source(Protocol):
    """Weights that can be read.  Any thread may read."""

    folder: Path
    format: Format
    config: ModelConfig
    files: list[Path]
    """Small files to carry along."""

    def names(self) -> list[str]:
        """All native names, first layer first."""
        ...

    def spec(self, name: str) -> Spec:
        """Native shape, and the dtype that `read` gives."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first dim of a weight, (out, in); all of it by default."""
        ...

    def part(self, name: str, box: Box) -> Tensor:
        """A range of every dim of a weight, (out, in); little else is read."""
        ...

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Blocks and scales of those rows, as they are stored; None if they are not MXFP4."""
        ...

    def close(self) -> None: ...


class PublishedSource:
    """A folder in one of the three published formats.

    Raises:
        UnknownTensor: a tensor in the folder is not of this model.
        ValueError: a tensor is missing, or has another shape or dtype than this model's.
    """

    def __init__(self, folder: Path, format: Published, config: ModelConfig, reader: Reader):
        self.folder = folder
        self.format: Format = format
        self.config = config
        self.files = carried_files(folder)
        self.reader = reader
        self._layout = layout(config, format)
        self._shapes = shapes(config)
        self._check(specs(config, format))

    def _check(self, wanted: dict[str, Spec]) -> None:
        places = self.reader.places
        unknown = [name for name in places if name not in wanted]
        if unknown:
            raise UnknownTensor(f"{self.folder}: {unknown_sentence(unknown)}")
        missing = [name for name in wanted if name not in places]
        if missing:
            raise ValueError(f"{self.folder}: {missing_sentence(missing)}")
        for name, (dtype, shape) in wanted.items():
            place = places[name]
            if place.spec.shape != shape:
                raise ValueError(
                    f"{place.file}: {name} has shape {place.spec.shape}, config.json makes it "
                    f"{shape}"
                )
            if place.spec.dtype != dtype and not (dtype in FLOATS and place.spec.dtype in FLOATS):
                raise ValueError(
                    f"{place.file}: {name} has dtype {word(place.spec.dtype)}, not {word(dtype)}"
                )

    def names(self) -> list[str]:
        return list(self._layout)

    def spec(self, name: str) -> Spec:
        stored = self._layout[name]
        packed = stored.kind == "packed"
        dtype = torch.bfloat16 if packed else self.reader.places[stored.names[0]].spec.dtype
        return Spec(dtype, self._shapes[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.part(name, rows(self._shapes[name], start, stop))

    def part(self, name: str, box: Box) -> Tensor:
        """No other bytes are read, but for whole groups of MXFP4."""
        stored = self._layout[name]
        if stored.kind == "packed":
            # A group is 32 numbers of the last dim: whole groups, then what was asked of them.
            *outer, last = box
            groups = slice(last.start // GROUP, -(-last.stop // GROUP))
            scales = self._checked(stored, self.reader.box(stored.names[1], (*outer, groups)))
            blocks = self.reader.box(stored.names[0], (*outer, groups, slice(0, GROUP // 2)))
            first = groups.start * GROUP
            return dequantize(blocks, scales)[..., last.start - first : last.stop - first]
        if stored.kind == "turned":
            experts, out, size = box
            return self.reader.box(stored.names[0], (experts, size, out)).mT
        first, *rest = box
        first = slice(stored.first + first.start, stored.first + first.stop)
        return self.reader.box(stored.names[0], (first, *rest))

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        stored = self._layout[name]
        if stored.kind != "packed":
            return None
        blocks, scales = (self.reader.read(part, start, stop) for part in stored.names)
        return blocks, self._checked(stored, scales)

    def _checked(self, stored: Stored, scales: Tensor) -> Tensor:
        """The published decoder takes byte 255 for 2 ** 128; its standard says: not a number."""
        if scales.numel() and int(scales.max()) == NOT_A_NUMBER:
            place = self.reader.places[stored.names[1]]
            raise ValueError(
                f"{place.file}: {stored.names[1]} has a scale of {NOT_A_NUMBER}, which in MXFP4 "
                "stands for no number: the file is damaged"
            )
        return scales

    def close(self) -> None:
        self.reader.close()


def missing_sentence(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"lacks {', '.join(names[:3])}{more}"


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def carried_files(folder: Path) -> list[Path]:
    """Those of CARRIED that a folder has; OpenAI's `original/` takes those of the folder above."""
    found = [folder / name for name in CARRIED if (folder / name).is_file()]
    if folder.name == "original":
        have = {path.name for path in found}
        found += [path for path in carried_files(folder.parent) if path.name not in have]
    return found


def check_same_shape(one: Source, other: Source) -> None:
    """Refuse two sources whose weights differ in name or shape."""
    for name in one.names():
        if name not in other.names():
            raise ValueError(f"{other.folder}: lacks {name}, which {one.folder} has")
        if one.spec(name).shape != other.spec(name).shape:
            raise ValueError(
                f"{other.folder}: {name} has shape {other.spec(name).shape}, "
                f"{one.spec(name).shape} in {one.folder}"
            )
