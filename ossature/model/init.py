"""Initial weights that depend on the seed and the name alone, not on ranks or order.

Matrices, sinks and the router's bias are drawn from N(0, initializer_range), as transformers
does; norms are one, all other biases zero.  An expert's matrix is drawn from a generator of its
own, so that a rank that holds some of the experts need not draw the others.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ossature.model.config import ModelConfig


def initial_weight(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The initial value of the parameter `name`, in fp32 on CPU.

    Args:
        shape: of the whole parameter, however it is sharded.
    """
    leaf = name.split(".", 2)[-1] if name.startswith("blocks.") else name
    if "norm" in leaf:
        return torch.ones(shape, device="cpu")
    if leaf.endswith("bias") and leaf != "moe.router.bias":
        return torch.zeros(shape, device="cpu")
    if len(shape) == 3:
        parts = [_normal(f"{name}.{expert}", shape[1:], seed) for expert in range(shape[0])]
        return torch.stack(parts).mul_(config.initializer_range)
    return _normal(name, shape, seed).mul_(config.initializer_range)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(generator=generator)
