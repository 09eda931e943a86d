"""OpenAI's `original/` folders, from and to: fused qkv, experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ossature.checkpoint.safetensors import Reader, Spec
from ossature.convert.config import original_config, read_config
from ossature.convert.hugging_face import write_json
from ossature.convert.names import ORIGINAL_PACKED
from ossature.convert.source import PublishedSource
from ossature.model.config import ModelConfig


def open_original(folder: Path) -> PublishedSource:
    """The weights of a folder."""
    return PublishedSource(folder, "openai", read_config(folder / "config.json"), Reader(folder))


def write_configs(folder: Path, config: ModelConfig, tensors: dict[str, Spec]) -> None:
    """config.json in OpenAI's words, and dtypes.json, which says what the bytes stand for."""
    (folder / "config.json").write_text(json.dumps(original_config(config)), encoding="utf-8")
    kinds: dict[str, str] = dict(zip(ORIGINAL_PACKED, ("FP4", "UE8"), strict=True))
    dtypes = {
        name: kinds["." + name.rpartition(".")[2]] if spec.dtype == torch.uint8 else "BF16"
        for name, spec in sorted(tensors.items())
    }
    write_json(folder / "dtypes.json", dtypes)


def shard_name(number: int, count: int) -> str:
    """As published: two hyphens, numbered from 1."""
    return f"model--{number + 1:05d}-of-{count:05d}.safetensors"
