"""Packed bytes of frozen experts as 16-bit numbers, in which form FSDP can shard them.

FSDP of torch 2.11 takes no parameter of bytes.  It copies numbers of the dtype it computes in as
they are, bit for bit, so bytes are given to it in pairs as such numbers, which nobody computes
with: the experts' own forward sees bytes again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ossature.model.frozen_experts import FrozenExperts
from ossature.model.transformer import Transformer


def store_as_numbers(model: Transformer, dtype: torch.dtype) -> None:
    """Make two bytes of packed experts a number, in place.

    Args:
        dtype: that FSDP gathers weights in; if that is no number of 16 bits, it casts nothing.
    """
    number = dtype if dtype.itemsize == 2 else torch.bfloat16
    for experts in packed_experts(model):
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if parameter.dtype == torch.uint8:
                pairs = nn.Parameter(parameter.detach().view(number), requires_grad=False)
                experts.register_parameter(name, pairs)


def use_as_bytes(model: Transformer) -> None:
    """Let the forward of packed experts see bytes; after what else hides their parameters."""
    for experts in packed_experts(model):
        experts.register_forward_pre_hook(_show_bytes)
        experts.register_forward_hook(_show_numbers, always_call=True)


def packed_experts(model: Transformer) -> Iterator[FrozenExperts]:
    for module in model.modules():
        if isinstance(module, FrozenExperts) and module.packed:
            yield module


PACKED = ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")


def _show_bytes(experts: nn.Module, _args: tuple) -> None:
    for name in PACKED:
        experts.__dict__[name] = getattr(experts, name).view(torch.uint8)


def _show_numbers(experts: nn.Module, *_: object) -> None:
    for name in PACKED:
        experts.__dict__.pop(name, None)
