"""Weights of any source -> one GGUF file, some rows at a time.

Experts in MXFP4 keep their bits; no other number changes but float32 matrices, which are rounded
to bfloat16.  The package `gguf` writes the header; the data is put where the header says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ossature.checkpoint.box import bytes_of
from ossature.checkpoint.gguf import ALIGNMENT, MXFP4, PLAIN, Place, read_header, to_groups
from ossature.checkpoint.safetensors import SYNC_BYTES, settle, write_at
from ossature.convert.destination import new_file
from ossature.convert.gguf import ARCHITECTURE, Stored, layout, metadata
from ossature.convert.gguf_tokenizer import chat_template, tokenizer_fields
from ossature.convert.source import Source, word
from ossature.convert.transfer import Report, in_order, is_packed, jobs

F32, BF16 = 0, 30
FILE_TYPES = {BF16: 32, MXFP4: 38}
"""What most numbers are, in GGUF's words: MOSTLY_BF16, MOSTLY_MXFP4_MOE."""
QUANTIZATION_VERSION = 2


def write_gguf(
    source: Source, path: Path, advance: Callable[[int], None] = lambda _bytes: None
) -> Report:
    """Write the weights of a source, with config, tokenizer and chat template, to a new file.

    Args:
        advance: called with the number of bytes of every piece that is written.

    Raises:
        ValueError: something of that name is there, or the format cannot hold this model.
        OSError: the disk is full, or the like.  No part is left under the file's name.
    """
    check_suffix(path)
    wanted, fields = tensors(source), header_fields(source, path)
    with new_file(path, sum(place.num_bytes for place in wanted.values())) as partial:
        places = _write_header(partial, fields, wanted)
        handle = os.open(partial, os.O_WRONLY)
        try:
            return _write_data(source, handle, places, advance)
        finally:
            os.close(handle)


def check_suffix(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ValueError(f"{path}: the name of a GGUF file must end in .gguf")


def notes(source: Source) -> list[str]:
    """What llama.cpp will do otherwise than other servers of the same weights, in sentences."""
    found = []
    if not source.config.rope_truncate and source.config.rope_factor != 1:
        found.append(
            "llama.cpp rounds the YaRN ramp to whole dimensions, and this model does not: its "
            "logits differ there, as those of every gpt-oss do"
        )
    if not chat_template({file.name: file for file in source.files}):
        found.append(
            f"{source.folder}: has no chat template: llama.cpp takes its own, of another format"
        )
    return found


def tensors(source: Source) -> dict[str, Place]:
    """Type and shape of every tensor of the file, in their order; no offsets yet."""
    found: dict[str, Place] = {}
    for name, (names, shape, matrix) in layout(source.config).items():
        packed = matrix and ".experts." in name and is_packed(source, name)
        type = MXFP4 if packed else BF16 if matrix else F32
        found |= {stored: Place(type, shape, 0) for stored in names}
    return found


def header_fields(source: Source, path: Path) -> dict[str, Any]:
    """All keys and values but the architecture, which comes first."""
    packed = is_packed(source, "blocks.0.moe.experts.down_weight")
    return {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[MXFP4 if packed else BF16],
        "general.quantization_version": QUANTIZATION_VERSION,
        **metadata(source.config),
        **tokenizer_fields(source.files, source.folder, source.config),
    }


def _write_header(path: Path, fields: dict[str, Any], wanted: dict[str, Place]) -> dict[str, Place]:
    """Make the file, in its full length, with all but the data; where the data goes."""
    try:
        from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    except ModuleNotFoundError:
        raise ValueError("--to gguf needs the package gguf: pip install 'ossature[gguf]'") from None
    kinds = {
        bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING, list: GGUFValueType.ARRAY,
    }  # fmt: skip
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        for key, value in fields.items():
            writer.add_key_value(key, value, kinds[type(value)])
        for name, place in wanted.items():
            kind = GGMLQuantizationType(place.type)
            writer.add_tensor_info(
                name, place.shape, np.dtype(np.float32), place.num_bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        end = writer.fout[0].tell()
    finally:
        writer.close()
    sizes = [end, *(place.num_bytes for place in wanted.values())]
    os.truncate(path, sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    return read_header(path)[1]


def _write_data(
    source: Source, handle: int, places: dict[str, Place], advance: Callable[[int], None]
) -> Report:
    report, stored, unsynced = Report(), layout(source.config), 0

    def make(job: tuple[str, int, int]) -> list[Tensor]:
        return recode(source, stored[job[0]], places, *job)

    for (name, start, _), parts in in_order(make, jobs(source)):
        for part, tensor in zip(stored[name].names, parts, strict=True):
            place, data = places[part], bytes_of(tensor)
            first = start * (place.num_bytes // place.shape[0])
            assert len(data) == len(tensor) * (place.num_bytes // place.shape[0]), part
            write_at(handle, data, place.offset + first)
            unsynced += len(data)
            advance(len(data))
        if unsynced >= SYNC_BYTES:
            settle(handle)
            unsynced = 0
        dtype = source.spec(name).dtype
        if start == 0 and places[stored[name].names[0]].type == BF16 and dtype != torch.bfloat16:
            report.cast[word(dtype)] = report.cast.get(word(dtype), 0) + 1
    return report


def recode(
    source: Source, stored: Stored, places: dict[str, Place], name: str, start: int, stop: int
) -> list[Tensor]:
    """Rows of a weight as the file has them: one tensor, or gate's and up's."""
    kind = places[stored.names[0]].type
    if kind == MXFP4:
        pair = source.packed(name, start, stop)
        assert pair is not None, name
        weight = to_groups(*pair)
    else:
        weight = source.read(name, start, stop).to(PLAIN[kind])
    if len(stored.names) == 1:
        return [weight.contiguous()]
    return [weight[:, turn::2].contiguous() for turn in range(2)]
