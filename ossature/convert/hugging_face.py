"""Folders as transformers and vLLM read them: bfloat16 or MXFP4, from and to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ossature.checkpoint.safetensors import Reader
from ossature.convert.config import HARMONY_VOCABULARY, hugging_face_config, read_config
from ossature.convert.layout import Published
from ossature.convert.names import HUGGING_FACE_PACKED
from ossature.convert.source import PublishedSource
from ossature.model.config import ModelConfig

END_OF_TEXT = ("<|return|>", "<|endoftext|>", "<|call|>")
"""What a model may end its text with."""
HARMONY_IDS = {
    "<|startoftext|>": 199998, "<|endoftext|>": 199999, "<|return|>": 200002, "<|call|>": 200012,
}  # fmt: skip


def token_ids(special: Mapping[str, int]) -> dict[str, int | None]:
    """Ids for config.json, of the special tokens that a tokenizer has.

    No bos: the published file has none, for nothing is put before a text.
    """
    eos = next((special[name] for name in END_OF_TEXT if name in special), None)
    return {"eos_token_id": eos, "pad_token_id": special.get("<|endoftext|>")}


def generation_config(special: Mapping[str, int]) -> dict[str, Any]:
    """generation_config.json as published, with the ids of a tokenizer's special tokens."""
    table: dict[str, Any] = {
        "bos_token_id": special.get("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": [special[name] for name in END_OF_TEXT if name in special],
        "pad_token_id": special.get("<|endoftext|>"),
        "transformers_version": "4.55.0.dev0",
    }
    return {key: value for key, value in table.items() if value not in (None, [])}


def open_hugging_face(folder: Path) -> PublishedSource:
    """The weights of a folder; bfloat16 or MXFP4 by the names of its tensors.

    float32 and float16 are accepted too: transformers keeps norms in float32 when it saves.
    """
    config = read_config(folder / "config.json")
    reader = Reader(folder)
    return PublishedSource(folder, format_of(reader), config, reader)


def format_of(reader: Reader) -> Published:
    packed = any(name.endswith(HUGGING_FACE_PACKED) for name in reader.places)
    return "mxfp4" if packed else "bf16"


def write_configs(folder: Path, config: ModelConfig, format: Published) -> None:
    """config.json, and generation_config.json for the published vocabulary if there is none."""
    table = hugging_face_config(config, "bfloat16", mxfp4=format == "mxfp4")
    write_json(folder / "config.json", table)
    generation = folder / "generation_config.json"
    if config.vocab_size == HARMONY_VOCABULARY and not generation.exists():
        write_json(generation, generation_config(HARMONY_IDS))


def write_json(path: Path, table: dict) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
