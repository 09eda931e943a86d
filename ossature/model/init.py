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
    if "lora_" in leaf:
        return _initial_adapter(name, shape, seed)
    if "norm" in leaf:
        return torch.ones(shape, device="cpu")
    if leaf.endswith("bias") and leaf != "moe.router.bias":
        return torch.zeros(shape, device="cpu")
    return _drawn(name, shape, seed).mul_(config.initializer_range)


def _initial_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A is drawn as Xavier, B is zero; of the embedding, a lookup in A, it is the other way round.

    A magnitude has no value of its own: see `ossature.model.lora.initial_magnitude`.
    """
    zero = "lora_a" if name.startswith("embedding.") else "lora_b"
    if name.endswith(zero):
        return torch.zeros(shape, device="cpu")
    if name == "embedding.lora_b":
        return _drawn(name, shape, seed)
    assert name.endswith("lora_a"), name
    return _drawn(name, shape, seed).mul_((2 / (shape[-2] + shape[-1])) ** 0.5)


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 3:
        parts = [_normal(f"{name}.{expert}", shape[1:], seed) for expert in range(shape[0])]
        return torch.stack(parts)
    return _normal(name, shape, seed)


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(generator=generator)
