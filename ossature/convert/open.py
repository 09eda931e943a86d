"""A folder -> a model divided over ranks, each of which reads its own parts and nothing else.

What every command that loads a model calls: one process has the whole model, ranks under torchrun
have what `--parallel.*` gives them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ossature.checkpoint.box import Box, pieces, within
from ossature.config import DataConfig, ParallelConfig, TrainConfig
from ossature.convert.folder import open_source
from ossature.convert.model import load_model
from ossature.convert.native import NativeSource
from ossature.convert.source import Source
from ossature.convert.transfer import PIECE_BYTES, in_order
from ossature.model.config import ModelConfig
from ossature.model.transformer import Transformer
from ossature.parallel import mesh as meshes
from ossature.parallel.fsdp import sharded
from ossature.parallel.gradients import local
from ossature.parallel.launch import Ranks
from ossature.parallel.plan import parallelize
from ossature.parallel.stages import check_pipeline
from ossature.parallel.weights import own_box


def open_model(
    folder: Path | str,
    parallel: ParallelConfig,
    dtype: torch.dtype | None,
    ranks: Ranks,
    device: torch.device | str | None = None,
    experts: Literal["plain", "mxfp4"] = "plain",
) -> Transformer:
    """The model of a folder in any format, to be called and not to be trained.

    All ranks make the same calls.  Those with a cache return the same logits on every rank, to
    the bit, so that all draw the same token.

    Args:
        dtype: of all weights and the computation; None keeps what each weight is stored in, for
            models that are not called.
        device: default: the rank's own.
        experts: as `load_model`; one rank can keep them packed.

    Raises:
        UnknownTensor, ValueError: the folder is damaged, or the axes do not fit the model or the
            number of ranks.
    """
    device = torch.device(ranks.device if device is None else device)
    if ranks.world > 1 and device.index is not None and device != ranks.device:
        raise ValueError(f"device ({device}): each of {ranks.world} ranks takes its own; leave out")
    run = _run(parallel)
    sizes = meshes.sizes(parallel, ranks.world)
    if ranks.world == 1:
        return load_model(folder, dtype=dtype, device=device, experts=experts).eval()
    if experts != "plain":
        raise ValueError(f"experts ({experts}): {ranks.world} ranks need them plain")
    source = open_source(folder, balance_bias=True)
    try:
        check(run, source.config)
        with torch.device("meta"):
            model = Transformer(source.config)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype or source.spec(name).dtype)
        # Frozen: FSDP then leaves alone what is on one rank, and would be there twice.
        model.requires_grad_(False)
        parallelize(model, meshes.build(sizes, device.type), run)
        for module in sharded(model):
            module.set_reshard_after_forward(True)
        model.to_empty(device=device)
        fill_model(model, source)
        biases = source.balance_biases() if isinstance(source, NativeSource) else {}
        for name, bias in biases.items():
            block, _, rest = name.removeprefix("blocks.").partition(".")
            if block in model.blocks:
                router = model.blocks[block].get_submodule(rest.rpartition(".")[0])
                router.register_buffer("balance_bias", bias.to(device))
    finally:
        source.close()
    model.register_forward_hook(_same_logits, with_kwargs=True)
    return model.eval()


def check(run: TrainConfig, shape: ModelConfig) -> None:
    """Refuse axes that do not divide what they split; rows can be padded and do not count."""
    axes = run.parallel
    meshes.check_model(axes, shape, seq_len=2 * axes.cp * axes.tp)
    check_pipeline(run, shape.num_hidden_layers, micro_batches=2 * axes.pp * axes.pp_chunks)


def fill_model(model: nn.Module, source: Source) -> None:
    """Set this rank's part of every weight; a few pieces are held at a time.

    Raises:
        ValueError: the model has a weight that the source lacks, or one of another shape.
    """
    mine: dict[str, tuple[Tensor, Box]] = {}
    names = set(source.names())
    for name, parameter in model.named_parameters():
        if name not in names:
            raise ValueError(f"{source.folder}: lacks {name}")
        if tuple(parameter.shape) != source.spec(name).shape:
            raise ValueError(
                f"{source.folder}: {name} has shape {source.spec(name).shape}, the model needs "
                f"{tuple(parameter.shape)}"
            )
        mine[name] = local(parameter.detach()), own_box(parameter)

    def read(job: tuple[str, Box]) -> None:
        name, box = job
        part, own = mine[name]
        part[within(box, own)].copy_(source.part(name, box))

    jobs = ((n, piece) for n, (_, own) in mine.items() for piece in pieces(own, PIECE_BYTES // 2))
    for _ in in_order(read, jobs):
        pass


def _run(parallel: ParallelConfig) -> TrainConfig:
    """What `parallelize` asks of a run, for a model that computes in the precision it is held in.

    Raises:
        ValueError: an axis is less than 1.
    """
    data = DataConfig(mock=True)
    return TrainConfig(run=Path("none"), data=data, parallel=parallel, precision="fp32")


def _same_logits(_model: nn.Module, _args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
    """The first rank's: ranks add up in other orders, and a draw hangs on the last bit."""
    if kwargs.get("cache") is None:
        return out
    out = out.contiguous()
    dist.broadcast(out, src=0)
    return out
