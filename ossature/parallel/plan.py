"""A model on the meta device -> this rank's part of it, in one fixed order of steps."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from ossature.config import TrainConfig
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import shard
from ossature.parallel.recompute import recompute


def parallelize(model: Transformer, mesh: DeviceMesh, config: TrainConfig) -> None:
    """Change `model` in place; its `config` and the names of its parameters stay as they are.

    The order has a reason: axes that split single layers (tp, ep, cp; not built yet) name plain
    modules, so they go first; recomputation wraps what they left; compile wants a block in its
    final form; FSDP shards whatever the others left, and its hooks stay outside of all that.
    """
    for block in model.blocks.values():
        recompute(block, config.recompute)
    if config.compile:
        for block in model.blocks.values():
            block.compile()
    shard(model, mesh, config.precision)
