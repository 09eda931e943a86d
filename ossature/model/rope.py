"""Rotary position embedding with YaRN (arXiv 2309.00071), as gpt-oss was trained with it.

Three traps: the ramp's bounds are not rounded (`rope_truncate` false), the concentration
multiplies cos and sin at every length, and the two halves of a head turn together, not pairs of
neighbours.  Nothing is stored: tables are computed from positions in fp32, so no buffer can be
lost, cast or left uninitialised.

Source: gpt_oss/torch/model.py of openai/gpt-oss@7b58334; bit-equal to
`_compute_yarn_parameters` of transformers (tests/model/test_rope.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ossature.model.config import ModelConfig


class Rotation(NamedTuple):
    """cos and sin of every angle, concentration included."""

    cos: Float[Tensor, "batch seq half"]
    sin: Float[Tensor, "batch seq half"]


def rotate(
    x: Float[Tensor, "batch seq heads head_dim"], rotation: Rotation
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Turn the pair (x[i], x[i + head_dim / 2]) of every head by the i-th angle."""
    cos, sin = (table.to(x.dtype)[:, :, None] for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotation(
    config: ModelConfig,
    position: Int[Tensor, "batch seq"],
    frequencies: Float[Tensor, " half"] | None = None,
) -> Rotation:
    """The tables of these positions, in fp32.

    Args:
        frequencies: `inverse_frequencies` of the config, if they are at hand.
    """
    if frequencies is None:
        frequencies = inverse_frequencies(config)
    angle = position[..., None].float() * frequencies.to(position.device)
    scale = concentration(config)
    return Rotation(angle.cos() * scale, angle.sin() * scale)


def concentration(config: ModelConfig) -> float:
    """Factor on cos and sin; attention logits grow by its square."""
    return 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1.0 else 1.0


def inverse_frequencies(config: ModelConfig) -> Float[Tensor, " half"]:
    """Radians per token of each pair: kept where fast, divided by the factor where slow."""
    size = config.head_dim
    powers = config.rope_theta ** (torch.arange(0, size, 2, device="cpu").float() / size)
    low, high = ramp_bounds(config)
    ramp = ((torch.arange(size // 2, device="cpu").float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (config.rope_factor * powers) * (1 - kept) + 1.0 / powers * kept


def ramp_bounds(config: ModelConfig) -> tuple[float, float]:
    """The pairs between which YaRN goes over from keeping to dividing the frequency."""

    def pair(turns: float) -> float:
        """The pair that makes so many turns in the original context."""
        length = config.rope_original_context / (turns * 2 * math.pi)
        return config.head_dim * math.log(length) / (2 * math.log(config.rope_theta))

    low, high = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(float(low), 0.0), min(float(high), config.head_dim - 1.0)
    return low, high if high != low else high + 0.001
