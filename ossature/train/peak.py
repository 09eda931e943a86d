"""The peak of live tensor bytes on this rank: what `ossature plan` says, measured.

On CPU every storage that an operator makes is followed until it goes, those inside our own
operators included.  What a library allocates for itself (gloo's copies, a kernel's scratch) is in
no tensor and not counted.  On CUDA the allocator counts: `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ossature.config import TrainConfig
from ossature.data.loader import Batch
from ossature.model.config import ModelConfig
from ossature.model.moe import Router
from ossature.parallel import mesh as meshes
from ossature.parallel.gradients import global_norm, local, scale_and_clip
from ossature.train import optim, setup
from ossature.train import step as steps

CPU = torch.device("cpu")


def measure(
    config: TrainConfig,
    shape: ModelConfig,
    world: int,
    device: torch.device = CPU,
    live: Live | None = None,
) -> int:
    """Peak bytes on this rank of a whole step: forward, backward, clipping, optimizer.

    It is the second one: the optimizer's states are made by the first.
    """
    live = Live() if live is None else live
    with live.watching() if device == CPU else nullcontext():
        mesh = meshes.build(meshes.sizes(config.parallel, world), device.type)
        model, pipeline = setup.divided_model(config, shape, mesh, device)
        for name, parameter in model.named_parameters():
            packed = name.endswith(("_blocks", "_scales"))
            torch.nn.init.normal_(local(parameter).detach(), std=0.0 if packed else 0.02)
        for block in model.blocks.values():
            router = block.get_submodule("moe.router")
            assert isinstance(router, Router)
            router.select = partial(_in_turn, router.select)
        weights = dict(model.named_parameters())
        optimizer = optim.build(weights.items(), config.optim, config.seed)
        if in_backward := config.optim.in_backward:
            assert isinstance(optimizer, optim.LeanAdamW)
            optim.InBackward(optimizer)
        rank, ranks = meshes.data_rank(mesh)
        for _ in range(2):
            live.peak = live.bytes
            if device != CPU:
                torch.cuda.reset_peak_memory_stats(device)
            batches = _batches(config, shape, rank, ranks)
            counted = steps.count(batches, False, mesh).tokens
            steps.accumulate(
                model, batches, counted, mesh, config.router, pipeline=pipeline,
                axes=config.parallel,
            )  # fmt: skip
            if in_backward:
                continue
            norm = global_norm(weights.values(), mesh)
            scale_and_clip(weights.values(), norm, config.optim.clip, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return live.peak if device == CPU else torch.cuda.max_memory_allocated(device)


def _in_turn(select: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Every expert as often as any other: what plans assume, and random weights do not do."""
    chosen = select(logits)
    order = torch.arange(chosen.numel(), device=chosen.device) % logits.shape[1]
    return order.view_as(chosen)


def _batches(config: TrainConfig, shape: ModelConfig, rank: int, ranks: int) -> list[Batch]:
    """One document a row."""
    micro, seq = config.micro_batch_tokens, config.data.seq_len
    rows = (micro // seq, seq)
    draw = torch.Generator().manual_seed(rank)
    position = torch.arange(seq).repeat(rows[0], 1)
    return [
        Batch(
            torch.randint(0, shape.vocab_size, rows, generator=draw),
            position.clone(),
            torch.zeros(rows, dtype=torch.int64),
            position > 0,
        )
        for _ in range(config.global_batch_tokens // (micro * ranks))
    ]


class Live(TorchDispatchMode):
    """Bytes of all storages that operators have made since it was entered, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        """By the address of the storage's own object."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come here next
        own = OPDEFS.get(op.name().partition(".")[0]) if op.namespace == "ossature" else None
        if own is None:
            out = op(*args, **(kwargs or {}))
        else:
            with self, torch.no_grad():
                out = own._init_fn(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = 0
        weakref.finalize(storage, self._resized, key, None)
        self._resized(key, storage.nbytes())

    def _resized(self, key: int, size: int | None) -> None:
        """None: it is gone."""
        self.bytes += (size or 0) - self._sizes.pop(key)
        if size is not None:
            self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    @contextmanager
    def watching(self) -> Iterator[Live]:
        """FSDP frees and takes memory by resizing storages, which is no operator."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            out = plain(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return out

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
