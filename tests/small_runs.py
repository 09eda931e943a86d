"""Small runs for tests: a tiny shape without two equal dimensions, and mock data in short rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ossature.config import DataConfig, TrainConfig
from ossature.data.loader import Batch
from ossature.model.config import SIZES, ModelConfig
from ossature.train.prove import packed_rows

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=3,
    sliding_window=7,
    rope_original_context=64,
    max_position_embeddings=2048,
    initializer_range=0.1,
    eos_token_id=None,
    pad_token_id=None,
)
DEEP = replace(TINY, num_hidden_layers=6, layer_types=TINY.layer_types * 3)
"""For stages."""
SIZES["deep"] = DEEP
SIZES["tiny"] = TINY  # tests give it by name, in this process and in ranks forked from it


def small_run(run: Path, **changes: Any) -> TrainConfig:
    """A run of 6 steps of 4 rows, 1 row a micro-batch, in fp32; keys of groups as `optim__lr`."""
    config = TrainConfig(
        run=run,
        model="tiny",
        steps=6,
        global_batch_tokens=128,
        micro_batch_tokens=32,
        precision="fp32",
        data=DataConfig(mock=True, seq_len=32),
    )
    config = change(
        config, optim__warmup_steps=2, optim__lr=1e-2, checkpoint__keep=0, log__tensorboard=False
    )
    return change(config, **changes)


def change(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The config with all changes at once: `optim__lr` is the key lr of the group optim."""
    top: dict[str, Any] = {}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            top[group] = replace(top.get(group, getattr(config, group)), **{name: value})
        else:
            top[group] = value
    return replace(config, **top)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ragged_batch(rows: int, seq: int = 32, seed: int = 0, vocab: int = 96) -> Batch:
    """Rows of two documents and padding; loss masks of very unequal density."""
    return packed_rows(rows, seq, vocab, seed=seed)


def part(batch: Batch, start: int, end: int) -> Batch:
    return Batch(*(x[start:end] for x in batch))


SIZES["tiny_text"] = replace(TINY, vocab_size=352)  # room for a small byte-level vocabulary


def text_corpus(folder: Path, name: str = "corpus", words: str = "def return self import") -> Path:
    """A data folder of 60 short texts with a tokenizer of its own."""
    from ossature.data.build import build

    texts = folder / f"{name}_texts"
    texts.mkdir()
    random = torch.Generator().manual_seed(len(words))
    for n in range(60):
        length = int(torch.randint(5, 60, (), generator=random))
        drawn = torch.randint(0, len(words.split()), (length,), generator=random).tolist()
        (texts / f"{n:02}.txt").write_text(" ".join(words.split()[d] for d in drawn))
    output = folder / name
    argv = [str(texts), "--train-tokenizer", "320", "--split", "8,1,1", "--workers", "1"]
    assert build([*argv, "--output", str(output)]) == 0
    return output
