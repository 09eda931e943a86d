"""A model on the meta device -> this rank's part of it, in one fixed order of steps."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from ossature.config import TrainConfig
from ossature.model.transformer import Transformer
from ossature.parallel.context import split_sequences
from ossature.parallel.expert import split_experts
from ossature.parallel.float8 import use_float8
from ossature.parallel.fsdp import COMPUTE_DTYPE, alone, shard
from ossature.parallel.masters import keep_masters
from ossature.parallel.mesh import dense_view, expert_view
from ossature.parallel.packed import store_as_numbers, use_as_bytes
from ossature.parallel.pipeline import Pipeline
from ossature.parallel.recompute import compile_block, offload, recompute
from ossature.parallel.tensor import split_tensors


def parallelize(model: Transformer, mesh: DeviceMesh, config: TrainConfig) -> Pipeline | None:
    """Change `model` in place; its `config` and the names of its parameters stay as they are.

    Returns what runs the stages of a pipeline, if there is one.

    The order has a reason: layers that multiply in 8 bits are layers of their own; pp takes out
    what other ranks have; axes that split single layers (tp, ep, etp) name plain modules, so they
    go before what wraps modules; compile and recomputation wrap what they left (which goes inside
    is said there); FSDP shards whatever the others left, and its hooks stay outside of all that.
    """
    axes = config.parallel
    pipeline = experts = None
    if config.float8:
        use_float8(model, config)
    if axes.pp > 1:
        pipeline = Pipeline(model, mesh, config)
    elif axes.cp > 1:
        split_sequences(model, mesh)
    store_as_numbers(model, COMPUTE_DTYPE[config.precision])
    if axes.tp > 1:
        split_tensors(model, dense_view(mesh), config)
    if axes.tp * axes.ep * axes.etp > 1:
        experts = expert_view(mesh, axes)
        split_experts(model, experts)
    use_as_bytes(model)
    for block in model.blocks.values():
        whole = config.recompute == "selective"
        if config.compile and not whole:
            compile_block(block)
        recompute(block, config.recompute, dropout=config.lora.dropout > 0)
        if config.compile and whole:
            compile_block(block, whole=True)
        if config.offload_activations:
            offload(block)
    if config.optim.in_backward:
        return None  # one rank whose weights are what is computed with: nothing to gather or cast
    if alone(mesh.size(), config):
        keep_masters(model, COMPUTE_DTYPE[config.precision])
        return None
    for root in (model,) if pipeline is None else pipeline.stages.values():
        shard(root, mesh, config, experts)
    return pipeline
