"""Activation checkpointing: what a block keeps for its backward pass.

`none` keeps everything, `full` only the block's input, `selective` the input and the outputs of
the operators in KEPT: matrix products, experts, attention, and the choice of experts.  The list
names operators, not shapes.  What else there is (norms, RoPE, casts, residuals) is cheap.

What is kept can wait in the memory of the host (`offload`).

Compiled blocks that are computed again as a whole are compiled first: torch lets the outer call be
eager, and compiles inside of it.  For the selective kind it is the other way around, for the
compiler has to see which operators are kept; and then the block must be a single graph: where one
ends in what is computed again, dynamo runs all of it eagerly and says nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ossature.parallel.gradients import local

KEPT = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::topk",
    "aten::_scaled_mm", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "ossature::experts", "ossature::adapted_linear", "ossature::row_squares",
    "ossature::full_attention", "ossature::window_attention",
    "ossature::chunk_attention", "flex_attention",
)  # fmt: skip


def recompute(block: nn.Module, mode: str, dropout: bool = False) -> None:
    """Make the block run its forward again in the backward pass, in place.

    The forward is wrapped and not the module: names of parameters stay as they are, and the hooks
    of FSDP, which gather the weights, stay outside.

    Args:
        dropout: whether the block draws random numbers, which have to be the same again.
    """
    if mode == "none":
        return
    plain = block.forward
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, **how, **kwargs)

    block.forward = forward


def compile_block(block: nn.Module, whole: bool = False) -> None:
    """Compile the block's forward, in place.

    Args:
        whole: raise where the graph ends, instead of going on with another one.
    """
    block.forward = torch.compile(block.forward, fullgraph=whole)


def offload(block: nn.Module) -> None:
    """Keep what the block's backward needs on the host, in place; goes around `recompute`.

    Weights stay where they are: FSDP drops and gathers them, and autograd is to see those.  The
    host waits for each copy.
    """
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        own = {local(p).untyped_storage().data_ptr() for p in block.parameters()}

        def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
            if tensor.untyped_storage().data_ptr() in own:
                return tensor
            return tensor.device, to_host(tensor)

        with saved_tensors_hooks(pack, _unpack):
            return plain(*args, **kwargs)

    block.forward = forward


def to_host(tensor: Tensor) -> Tensor:
    """A copy, in memory that a CUDA device reads at full speed."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


def _unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, copy = kept
    return copy.to(device, non_blocking=True)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    if name.partition(".")[0] in KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
