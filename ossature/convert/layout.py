"""How each published format stores each weight, from the one table of names."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ossature.checkpoint.safetensors import Spec
from ossature.convert.names import HUGGING_FACE_PACKED, ORIGINAL_PACKED, dims, rows, shapes
from ossature.kernels.mxfp4 import GROUP
from ossature.model.config import ModelConfig

Published = Literal["bf16", "mxfp4", "openai"]
Format = Literal["bf16", "mxfp4", "openai", "native", "gguf"]
FORMATS: tuple[Format, ...] = ("bf16", "mxfp4", "openai", "native")
"""Those that are folders; the other is a file."""
TITLES: dict[Format, str] = {
    "bf16": "Hugging Face, bfloat16",
    "mxfp4": "Hugging Face, MXFP4",
    "openai": "OpenAI original, MXFP4",
    "native": "native (torch.distributed.checkpoint)",
    "gguf": "GGUF of llama.cpp",
}


class Stored(NamedTuple):
    """Where and how one weight is stored."""

    names: tuple[str, ...]
    """One tensor, or blocks and scales."""
    kind: Literal["plain", "turned", "packed"]
    """As it is; with its last two dims exchanged; in MXFP4."""
    first: int = 0
    """Row of the stored tensor at which the weight begins (q, k and v in one)."""


def layout(config: ModelConfig, format: Published) -> dict[str, Stored]:
    """Native name -> place, for every weight of a model."""
    size = dims(config)
    places: dict[str, Stored] = {}
    for native, row in rows(config).items():
        if format == "openai":
            before = [0, size["query"], size["query"] + size["key"]]
            first = before[row.fused] if row.fused >= 0 else 0
            stored = _packed(row.original, ORIGINAL_PACKED) if row.expert_matrix else None
            places[native] = stored or Stored((row.original,), "plain", first)
        elif not row.expert_matrix:
            places[native] = Stored((row.hugging_face,), "plain")
        elif format == "mxfp4":
            places[native] = _packed(row.hugging_face, HUGGING_FACE_PACKED)
        else:
            places[native] = Stored((row.hugging_face,), "turned")
    return places


def _packed(name: str, ends: tuple[str, ...]) -> Stored:
    return Stored(tuple(name + end for end in ends), "packed")


def specs(config: ModelConfig, format: Published) -> dict[str, Spec]:
    """Stored name -> dtype and shape of every tensor of a folder, as we write it.

    Raises:
        ValueError: MXFP4 cannot hold a matrix of this width.
    """
    shape_of = shapes(config)
    tensors: dict[str, Spec] = {}
    for native, (names, kind, first) in layout(config, format).items():
        shape = shape_of[native]
        if kind == "packed":
            if shape[-1] % GROUP:
                width = "hidden_size" if native.endswith("gate_up_weight") else "intermediate_size"
                raise ValueError(
                    f"{width} ({shape[-1]}) must be a multiple of {GROUP} to be stored in MXFP4"
                )
            scales = (*shape[:-1], shape[-1] // GROUP)
            tensors[names[0]] = Spec(torch.uint8, (*scales, GROUP // 2))
            tensors[names[1]] = Spec(torch.uint8, scales)
        elif kind == "turned":
            tensors[names[0]] = Spec(torch.bfloat16, (shape[0], shape[2], shape[1]))
        else:  # parts of a fused tensor come in the order of their rows
            tensors[names[0]] = Spec(torch.bfloat16, (first + shape[0], *shape[1:]))
    return tensors
