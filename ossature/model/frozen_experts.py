"""Experts whose matrices do not train: plain or packed in MXFP4, with adapters or without.

Packed, a matrix is two parameters of bytes in place of `gate_up_weight` (and so for down):

    gate_up_blocks (experts, 2 inner, groups, 16)      gate_up_scales (experts, groups, 2 inner)

4.25 bits a number.  Rows come last in the scales, so that both have an even last dim: FSDP of
torch 2.11 shards no bytes, and they are given to it as 16-bit numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ossature.config import LoraConfig
from ossature.kernels.experts import combine, dispatch, sort_by_expert
from ossature.kernels.frozen_experts import adapted_linear, row_squares, unpack, weighted_swiglu
from ossature.kernels.mxfp4 import GROUP, quantize
from ossature.model.moe import Experts, eager_experts

MATRICES = ("gate_up", "down")


class FrozenExperts(Experts):
    """`Experts` for fine-tuning.  It is made from one by `adopt`, which keeps what is in it."""

    lora: LoraConfig
    add_squares: dict[str, Callable[[Tensor], Tensor]]
    """For a matrix of which other ranks have other columns: adds up the squares of its rows."""

    @classmethod
    def adopt(cls, experts: Experts, config: LoraConfig, targets: Iterable[str]) -> None:
        """Make frozen experts into this, with adapters for `targets`, in place.

        Raises:
            ValueError: a matrix to be packed is no multiple of 32 wide.
        """
        experts.__class__ = cls  # FSDP does the same
        assert isinstance(experts, cls)
        experts.lora, experts.add_squares = config, {}
        if config.base == "mxfp4" and not experts.packed:
            experts.pack()
        for name in MATRICES:
            experts._add_adapter(name, name in targets)

    def _add_adapter(self, name: str, wanted: bool) -> None:
        bias, rank = self.get_parameter(f"{name}_bias"), self.lora.rank
        experts, out = bias.shape
        inputs = {"gate_up": self.down_bias.shape[1], "down": self.gate_up_bias.shape[1] // 2}
        size = inputs[name]
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("lora_a", (experts, rank, size)),
            ("lora_b", (experts, out, rank)),
            ("lora_magnitude", (experts, out)),
        ]
        wide = torch.promote_types(bias.dtype, torch.float32)
        for kind, shape in shapes:
            new = None
            if wanted and (kind != "lora_magnitude" or self.lora.dora):
                new = nn.Parameter(torch.empty(shape, dtype=wide, device=bias.device))
            self.register_parameter(f"{name}_{kind}", new)

    @torch.no_grad()
    def pack(self) -> None:
        """Hold the matrices in MXFP4 from now on; what they were is rounded to it."""
        for name in MATRICES:
            weight = self.get_parameter(f"{name}_weight")
            experts, out, size = weight.shape
            if size % GROUP:
                width = "hidden_size" if name == "gate_up" else "intermediate_size"
                raise ValueError(
                    f"lora.base = mxfp4 needs {width} ({size}) to be a multiple of {GROUP}"
                )
            groups = size // GROUP
            blocks = weight.new_empty(experts, out, groups, GROUP // 2, dtype=torch.uint8)
            scales = weight.new_empty(experts, groups, out, dtype=torch.uint8)
            if not weight.is_meta:
                for expert in range(experts):
                    blocks[expert], turned = quantize(weight[expert])
                    scales[expert] = turned.mT
            self.register_parameter(f"{name}_weight", None)
            self.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        if self.form == "eager":
            assert not (self.lora.dropout and self.training), "the specification drops nothing"
            matrices = (
                self.merged("gate_up").to(x.dtype), self.gate_up_bias,
                self.merged("down").to(x.dtype), self.down_bias,
            )  # fmt: skip
            return eager_experts(x, chosen, weights, *matrices, self.alpha, self.limit)
        order, counts = sort_by_expert(chosen, self.gate_up_bias.shape[0])
        rows = dispatch(x, order, chosen.shape[1])
        weights = weights.flatten()[order]
        inner = weighted_swiglu(
            self._multiply("gate_up", rows, counts, None), weights, self.alpha, self.limit
        )
        rows = self._multiply("down", inner, counts, weights)
        return combine(rows, order, chosen.shape[1])

    def _multiply(
        self, name: str, rows: Tensor, counts: Tensor, row_weights: Tensor | None
    ) -> Tensor:
        weight, scales, bias, a, b, magnitude = self._parts(name)
        dtype, low = rows.dtype, None
        if a is not None and self.lora.dropout and self.training:
            low = F.dropout(rows, self.lora.dropout)
        gain = None
        if magnitude is not None and a is not None and b is not None:
            squares = row_squares(weight, scales, a, b, self.lora.scale, counts)
            if name in self.add_squares:
                squares = self.add_squares[name](squares)
            gain = (magnitude / not_zero(squares.sqrt())).to(dtype)
        a, b = (None if x is None else x.to(dtype) for x in (a, b))
        return adapted_linear(
            rows, counts, weight, scales, bias.to(dtype), row_weights, low, a, b, gain,
            self.lora.scale,
        )  # fmt: skip

    def _parts(self, name: str) -> Any:
        """Weight or blocks; scales; bias; A, B and the magnitude.  None for what there is not."""
        packed = self.packed
        return (
            getattr(self, f"{name}_blocks" if packed else f"{name}_weight"),
            getattr(self, f"{name}_scales") if packed else None,
            *(getattr(self, f"{name}_{end}") for end in ("bias", "lora_a", "lora_b")),
            getattr(self, f"{name}_lora_magnitude"),
        )

    @property
    def packed(self) -> bool:
        return "gate_up_blocks" in self._parameters

    def merged(self, name: str) -> Float[Tensor, "experts out in"]:
        """W' of all experts, in fp64 where there is an adapter: the specification."""
        weight, scales, _, a, b, magnitude = self._parts(name)
        weight = unpack(weight, scales, torch.bfloat16 if scales is not None else weight.dtype)
        return weight if a is None else merged(weight, a, b, magnitude, self.lora.scale)

    @torch.no_grad()
    def init_magnitudes(self) -> None:
        for name in MATRICES:
            weight, scales, _, _, _, magnitude = self._parts(name)
            if magnitude is None:
                continue
            for expert in range(len(magnitude)):
                pair = weight[expert], None if scales is None else scales[expert]
                norms = torch.linalg.vector_norm(unpack(*pair, torch.float64), dim=-1)
                magnitude[expert].copy_(norms)


def merged(
    weight: Float[Tensor, "*experts out in"],
    a: Float[Tensor, "*experts rank in"],
    b: Float[Tensor, "*experts out rank"],
    magnitude: Float[Tensor, "*experts out"] | None,
    scale: float,
) -> Float[Tensor, "*experts out in"]:
    """W', in fp64, differentiable.  For the embedding, of its transpose."""
    whole = weight.double() + scale * (b.double() @ a.double())
    if magnitude is None:
        return whole
    norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True).detach()
    return magnitude.double()[..., None] * whole / not_zero(norm)


def not_zero(norm: Tensor) -> Tensor:
    """A row of zeros stays one."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)
