"""Validation on a fixed set while a run goes on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import TrainConfig
from ossature.data.loader import Batch, Loader
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import inference
from ossature.parallel.mesh import data_rank
from ossature.sample.generate import evaluating
from ossature.train.step import targets


def validation_rows(config: TrainConfig) -> int:
    """Rows of the validation set: eval.tokens rounded up to whole micro-batches."""
    micro = config.micro_batch_tokens
    return -(-config.eval.tokens // micro) * micro // config.data.seq_len


def validation_loader(config: TrainConfig, vocab_size: int) -> Loader:
    """Reads the same rows on every rank, whatever their number: `validate` deals them out."""
    return Loader(
        config.data,
        split="validation",
        seed=config.seed,
        global_batch_rows=validation_rows(config),
        micro_batch_rows=config.micro_batch_tokens // config.data.seq_len,
        rank=0,
        world=1,
        vocab_size=vocab_size,
        max_rows=validation_rows(config),
    )


@torch.no_grad()
def validate(model: Transformer, loader: Loader, mesh: DeviceMesh) -> float:
    """Mean cross-entropy per counted token of the set, without router losses.

    The set does not change from one call to the next, nor with the number of ranks.
    """
    rank, world = data_rank(mesh)
    device = torch.device(mesh.device_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted = 0
    with evaluating(model), inference(model):
        for turn in _turns(loader, world):
            # Weights are gathered by all ranks together: one without a batch repeats another's.
            batch = turn[rank] if rank < len(turn) else turn[0]
            goal = targets(batch)
            loss = model(
                batch.tokens.to(device),
                position=batch.position.to(device),
                document=batch.document.to(device),
                targets=goal.to(device),
            )
            if rank < len(turn):
                total += loss
                counted += int((goal >= 0).sum())
    # Ranks of pp and tp know the same loss, those of cp parts of it; all count whole rows.
    same = mesh["pp"].size() * mesh["tp"].size()
    parts = [total.cpu() / same, torch.tensor(counted / (same * mesh["cp"].size())).double()]
    sums = torch.stack(parts)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp(min=1))


def _turns(loader: Loader, world: int) -> Any:
    """The micro-batches of the set, `world` at a time."""
    turn: list[Batch] = []
    for batch in loader.micro_batches(0):
        turn.append(batch)
        if len(turn) == world:
            yield turn
            turn = []
    if turn:
        yield turn
