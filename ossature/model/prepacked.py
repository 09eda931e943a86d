"""Matrices in the layout that oneDNN multiplies few rows with: bfloat16 on a CPU, for sampling.

A step of sampling reads every matrix once for a few rows, and its time is that of reading.  Rows
and columns as they lie are read at half the rate of blocks that were put in order beforehand.
Gate and up rows of an expert come apart on that occasion.

A matrix takes as much memory as before; it is no parameter any more, and the model can be called
and nothing else.  Products and biases are added up in fp32 before they are rounded.

The layout is oneDNN's own, through the operators that torch's compiler uses for it (torch 2.11 to
2.13); tests/model/test_prepacked.py ties the results to the plain model's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ossature.kernels.experts import _activate, sort_by_expert
from ossature.model.attention import Attention
from ossature.model.moe import Experts
from ossature.model.rope import Rotation, rotate
from ossature.model.transformer import Head, Transformer

ROWS = 8
"""For which the blocks are chosen; any number works."""


def can_prepack(model: Transformer) -> bool:
    """Whether `prepack` makes this model faster: all of it in bfloat16 on a CPU that has it."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters())
    )


@torch.no_grad()
def prepack(model: Transformer) -> None:
    """Put the matrices of plain linears, experts and the head in order, in place."""
    for module in list(model.modules()):
        if type(module) is Attention:
            PrepackedAttention.adopt(module)
    for module in model.modules():
        # Exactly these: what has adapters, or is packed otherwise, stays as it is.
        if type(module) is nn.Linear:
            PrepackedLinear.adopt(module)
        elif type(module) is Head:
            PrepackedHead.adopt(module)
        elif type(module) is Experts and module.form == "fast":
            PrepackedExperts.adopt(module)


class PrepackedLinear(nn.Linear):
    blocks: Tensor

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.blocks = _ordered(linear.weight)
        linear.register_parameter("weight", None)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return _multiply(input, self.blocks, self.bias)


class PrepackedAttention(Attention):
    """Queries, keys and values of one product."""

    qkv_blocks: Tensor
    qkv_bias: Tensor
    turned: tuple[int, int]
    """Heads of queries and of keys."""

    @classmethod
    def adopt(cls, attention: Attention) -> None:
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        if any(type(part) is not nn.Linear for part in parts):
            return
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.qkv_blocks = _ordered(torch.cat([part.weight for part in parts]))
        attention.qkv_bias = torch.cat([part.bias for part in parts])
        queries, keys = (len(part.bias) // attention.head_dim for part in parts[:2])
        attention.turned = queries, keys
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.register_module(name, None)

    def project(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "batch seq heads head_dim"], Tensor, Tensor]:
        heads = _multiply(x, self.qkv_blocks, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        turned = sum(self.turned)
        q, k = rotate(heads[..., :turned, :], rotation).split(self.turned, -2)
        return q, k, heads[..., turned:, :]


class PrepackedHead(Head):
    blocks: Tensor

    @classmethod
    def adopt(cls, head: Head) -> None:
        head.__class__ = cls
        assert isinstance(head, cls)
        head.blocks = _ordered(head.weight)
        head.register_parameter("weight", None)

    def logits(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        return _multiply(x, self.blocks, None)


class PrepackedExperts(Experts):
    gate_up_blocks: list[Tensor]
    """Of each expert; gate rows, then up rows."""
    down_blocks: list[Tensor]

    @classmethod
    def adopt(cls, experts: Experts) -> None:
        experts.__class__ = cls
        assert isinstance(experts, cls)
        apart = (torch.cat([w[0::2], w[1::2]]) for w in experts.gate_up_weight.unbind())
        experts.gate_up_blocks = [_ordered(weight) for weight in apart]
        bias = experts.gate_up_bias
        experts.gate_up_bias = nn.Parameter(
            torch.cat([bias[:, 0::2], bias[:, 1::2]], 1), requires_grad=False
        )
        experts.register_parameter("gate_up_weight", None)
        experts.down_blocks = [_ordered(weight) for weight in experts.down_weight.unbind()]
        experts.register_parameter("down_weight", None)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        order, counts = sort_by_expert(chosen, len(self.down_blocks))
        used = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
        sizes = [count for _, count in used]
        rows = x[order // chosen.shape[1]].split(sizes)
        biases = self.gate_up_bias, self.down_bias
        inner = torch.cat(
            [
                _multiply(part, self.gate_up_blocks[expert], biases[0][expert])
                for part, (expert, _) in zip(rows, used, strict=True)
            ]
        )
        gate, up = inner.chunk(2, -1)
        inner = _activate(gate, up, self.alpha, self.limit).mul_(1 / self.alpha).split(sizes)
        out = torch.cat(
            [
                _multiply(part, self.down_blocks[expert], biases[1][expert])
                for part, (expert, _) in zip(inner, used, strict=True)
            ]
        )
        placed = torch.empty_like(out)
        placed[order] = out
        return torch.bmm(weights[:, None], placed.unflatten(0, chosen.shape))[:, 0]


def _ordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _multiply(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")
