"""A model that can be talked to: its weights, and a tokenizer that knows harmony."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ossature.config import ParallelConfig
from ossature.convert.folder import resolve
from ossature.convert.open import open_model
from ossature.data.harmony import check
from ossature.data.tokenizer import Tokenizer, load
from ossature.model.prepacked import can_prepack, prepack
from ossature.model.transformer import Transformer
from ossature.parallel.launch import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_tokenizer(folder: Path, given: str) -> Tokenizer:
    """The tokenizer that is given, or else that of the folder.

    Raises:
        ValueError: there is none, or it lacks tokens of harmony.
    """
    folder = resolve(folder)
    if not given and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json beside the weights; say which one with --tokenizer"
        )
    tokenizer = load(given or str(folder))
    check(tokenizer)
    return tokenizer


def open_to_talk(
    folder: Path,
    parallel: ParallelConfig,
    dtype: str,
    ranks: Ranks,
    device: str,
    experts: Literal["plain", "mxfp4"],
    adapters: bool = False,
) -> Transformer:
    """The model of a folder in any format.

    Args:
        adapters: some will be put on it; weights then stay as they are.
    """
    if adapters and ranks.world > 1:
        raise ValueError(f"adapter: {ranks.world} ranks cannot put adapters on; use one")
    model = open_model(resolve(folder), parallel, DTYPES[dtype], ranks, device or None, experts)
    if ranks.world == 1 and not adapters and can_prepack(model):
        prepack(model)
    return model
