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


def initial_weight(
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    part: tuple[slice, ...] | None = None,
) -> Tensor:
    """The initial value of the parameter `name`, in fp32 on CPU.

    Args:
        shape: of the whole parameter, however it is sharded.
        part: start and stop in every dim, of what is wanted; default: all of it.
    """
    part = tuple(slice(0, size) for size in shape) if part is None else part
    sizes = [cut.stop - cut.start for cut in part]
    leaf = name.split(".", 2)[-1] if name.startswith("blocks.") else name
    if "lora_" in leaf:
        return _initial_adapter(name, shape, seed, part)
    if "norm" in leaf:
        return torch.ones(sizes, device="cpu")
    if leaf.endswith("bias") and leaf != "moe.router.bias":
        return torch.zeros(sizes, device="cpu")
    return _drawn(name, shape, seed, part).mul_(config.initializer_range)


def _initial_adapter(
    name: str, shape: tuple[int, ...], seed: int, part: tuple[slice, ...]
) -> Tensor:
    """A is drawn as Xavier, B is zero; of the embedding, a lookup in A, it is the other way round.

    A magnitude has no value of its own: see `ossature.model.lora.initial_magnitude`.
    """
    zero = "lora_a" if name.startswith("embedding.") else "lora_b"
    if name.endswith(zero):
        return torch.zeros([cut.stop - cut.start for cut in part], device="cpu")
    if name == "embedding.lora_b":
        return _drawn(name, shape, seed, part)
    assert name.endswith("lora_a"), name
    return _drawn(name, shape, seed, part).mul_((2 / (shape[-2] + shape[-1])) ** 0.5)


def _drawn(name: str, shape: tuple[int, ...], seed: int, part: tuple[slice, ...]) -> Tensor:
    if len(shape) == 3:
        mine, *inner = part
        experts = range(mine.start, mine.stop)
        drawn = [_normal(f"{name}.{e}", shape[1:], seed)[tuple(inner)] for e in experts]
        return torch.stack(drawn) if drawn else torch.empty(0, *shape[1:])[:, *inner]
    return _normal(name, shape, seed)[part]


def _normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, device="cpu").normal_(generator=generator)
