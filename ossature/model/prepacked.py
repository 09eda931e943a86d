"""Matrices in the layout that oneDNN multiplies few rows with, on a CPU: for sampling.

A step of sampling reads every matrix once for a few rows, and its time is that of reading.  Rows
and columns as they lie are read at half the rate of blocks that were put in order beforehand.
Gate and up rows of an expert come apart on that occasion, and what is always computed in fp32
(norms, routers, sinks) is widened.

A matrix takes as much memory as before; it is no parameter any more, and the model can be called
and nothing else.  Products and biases are added up in fp32 before they are rounded.

In float32 a row of a product has the same bits whatever the other rows: oneDNN is asked whether it
does so before it is used (that of torch 2.13 does, that of 2.11 does not), and a single row is
multiplied as two.  tests/model/test_prepacked.py.

The layout is oneDNN's own, through the operators that torch's compiler uses for it (torch 2.11 to
2.13); the same file ties the results to the plain model's.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ossature.kernels.experts import Few, sort_by_expert
from ossature.model.attention import Attention
from ossature.model.moe import FEW, Experts, Router
from ossature.model.rope import Rotation
from ossature.model.transformer import Head, RMSNorm, Transformer

ROWS = 8
"""For which the blocks are chosen; any number works."""
VECTOR = 64
"""Numbers that a vectorised loop of torch takes at a time, at most."""


def can_prepack(model: Transformer) -> bool:
    """Whether `prepack` makes this model faster: all of it in one dtype, on a CPU, all plain."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if any(p.device.type != "cpu" for p in model.parameters()) or len(dtypes) > 1:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if dtypes == {torch.bfloat16}:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtypes == {torch.float32} and _keeps_rows_apart(model)


@torch.no_grad()
def prepack(model: Transformer) -> None:
    """Put the matrices of plain linears, experts and the head in order, in place."""
    tables = _HeadTables()
    for module in list(model.modules()):
        if type(module) is Attention:
            PrepackedAttention.adopt(module, tables)
    for module in model.modules():
        # Exactly these: what has adapters, or is packed otherwise, stays as it is.
        if type(module) is nn.Linear:
            PrepackedLinear.adopt(module)
        elif type(module) is Head:
            PrepackedHead.adopt(module)
        elif type(module) is Router:
            PrepackedRouter.adopt(module)
        elif type(module) is RMSNorm:
            PrepackedNorm.adopt(module)
        elif type(module) is Experts and module.form == "fast":
            PrepackedExperts.adopt(module)


def prepacked(model: nn.Module) -> bool:
    """Whether this has been done to all of a model."""
    kinds = PrepackedLinear, PrepackedHead, PrepackedRouter, PrepackedExperts
    plain = nn.Linear, Head, Router, Experts
    return not any(isinstance(m, plain) and not isinstance(m, kinds) for m in model.modules())


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
    tables: _HeadTables

    @classmethod
    def adopt(cls, attention: Attention, tables: _HeadTables) -> None:
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        if any(type(part) is not nn.Linear for part in parts):
            return
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.qkv_blocks = _ordered(torch.cat([part.weight for part in parts]))
        attention.qkv_bias = torch.cat([part.bias for part in parts])
        queries, keys = (len(part.bias) // attention.head_dim for part in parts[:2])
        attention.turned, attention.tables = (queries, keys), tables
        attention.sinks.weight = _widened(attention.sinks.weight)
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.register_module(name, None)

    def project(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "batch seq heads head_dim"], Tensor, Tensor]:
        heads = _multiply(x, self.qkv_blocks, self.qkv_bias).view(*x.shape[:2], -1, self.head_dim)
        turned = sum(self.turned)
        # Not split, which takes a detour through Python; and so below.
        q, k = self.tables.rotate(heads[..., :turned, :], rotation).split_with_sizes(
            self.turned, -2
        )
        return q, k, heads[..., turned:, :]


class _HeadTables:
    """The tables of RoPE laid out for whole heads: once a pass, for all of its layers."""

    def __init__(self) -> None:
        self._of: Rotation | None = None

    def rotate(
        self, x: Float[Tensor, "batch seq heads head_dim"], rotation: Rotation
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """As `ossature.model.rope.rotate`, with fewer operations."""
        if self._of is not rotation:
            cos, sin = (table.to(x.dtype)[:, :, None] for table in rotation)
            self._cos, self._sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._of = rotation
        return (x * self._cos).addcmul_(x.roll(x.shape[-1] // 2, -1), self._sin)


class PrepackedNorm(RMSNorm):
    """The layer norm of (x, -x): their mean is zero, and what is left is a root mean square.

    One operation does it, in fp32, the multiplication with the weight included.
    """

    twice: Tensor

    @classmethod
    def adopt(cls, norm: RMSNorm) -> None:
        norm.__class__ = cls
        assert isinstance(norm, cls)
        norm.weight = _widened(norm.weight)
        norm.twice = torch.cat([norm.weight, torch.zeros_like(norm.weight)]).detach()

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        both = torch.cat((x, -x), -1)
        return F.layer_norm(both, self.twice.shape, self.twice, None, self.eps)[..., : x.shape[-1]]


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


class PrepackedRouter(Router):
    blocks: Tensor

    @classmethod
    def adopt(cls, router: Router) -> None:
        router.__class__ = cls
        assert isinstance(router, cls)
        router.blocks, router.bias = _ordered(router.weight.float()), _widened(router.bias)
        router.register_parameter("weight", None)

    def score(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        return _multiply(x, self.blocks, self.bias)


class PrepackedExperts(Experts):
    gate_up_blocks: list[Tensor]
    """Of each expert; gate rows, then up rows."""
    down_blocks: list[Tensor]
    biases: tuple[list[Tensor], list[Tensor]]
    """Of each expert, for the two products."""

    @classmethod
    def adopt(cls, experts: Experts) -> None:
        experts.__class__ = cls
        assert isinstance(experts, cls)
        apart = (torch.cat([w[0::2], w[1::2]]) for w in experts.gate_up_weight.unbind())
        experts.gate_up_blocks = [_ordered(weight) for weight in apart]
        experts.register_parameter("gate_up_weight", None)
        experts.down_blocks = [_ordered(weight) for weight in experts.down_weight.unbind()]
        experts.register_parameter("down_weight", None)
        bias = experts.gate_up_bias
        experts.gate_up_bias = nn.Parameter(
            torch.cat([bias[:, 0::2], bias[:, 1::2]], 1), requires_grad=False
        )
        experts.biases = (
            list(experts.gate_up_bias.detach().unbind()),
            list(experts.down_bias.detach().unbind()),
        )

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        chosen: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        if len(x) == 1:
            # In float32 as two: see `_multiply`.
            twins = 2 if x.dtype == torch.float32 else 1
            experts, rows = chosen[0].tolist(), x.expand(twins, -1).contiguous()
            inner = self._activate(torch.cat([self._gate_up(rows, expert) for expert in experts]))
            parts = zip(inner.view(-1, twins, inner.shape[1]).unbind(), experts, strict=True)
            placed = torch.cat([self._down(part, expert) for part, expert in parts])[::twins]
        elif len(x) <= FEW:
            few = Few(chosen, 1)
            rows = x.index_select(0, few.pair // few.k)
            inner = self._activate(torch.cat([self._gate_up(rows[s], e) for e, s in few.spans]))
            out = torch.cat([self._down(inner[s], e) for e, s in few.spans])
            placed = out.index_select(0, few.place)
        else:
            order, counts = sort_by_expert(chosen, len(self.down_blocks))
            rows = x.index_select(0, order // chosen.shape[1]).split(counts.tolist())
            # One expert after the other: what is between its products stays in the cache.
            out = [
                self._down(self._activate(self._gate_up(part, expert)), expert)
                for expert, part in enumerate(rows)
                if len(part)
            ]
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            placed = torch.cat(out).index_select(0, place)
        placed = placed.float().view(*chosen.shape, -1)
        sums = torch.bmm(weights[:, None].float(), placed)
        return sums[:, 0].to(x.dtype)

    def _gate_up(self, rows: Tensor, expert: int) -> Tensor:
        return _multiply(rows, self.gate_up_blocks[expert], self.biases[0][expert])

    def _down(self, rows: Tensor, expert: int) -> Tensor:
        return _multiply(rows, self.down_blocks[expert], self.biases[1][expert])

    def _activate(self, gate_up: Tensor) -> Tensor:
        """`ossature.model.moe.swiglu` of gates and ups that lie apart."""
        gate, up = gate_up.chunk(2, -1)
        gate, up = gate.clamp_(max=self.limit), up.clamp_(-self.limit, self.limit)
        act = (gate * self.alpha).sigmoid_().mul_(gate)
        return act.addcmul_(act, up)


def _widened(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().float(), requires_grad=False)


def _ordered(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _multiply(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32 and x.numel() == x.shape[-1]:
        # oneDNN may multiply a single row in another way than that row among others.
        return _linear(torch.cat((x, x)), blocks, bias, "none", [], "")[:1]
    return _linear(x, blocks, bias, "none", [], "")


_linear = torch.ops.mkldnn._linear_pointwise.default


def _keeps_rows_apart(model: Transformer) -> bool:
    """Whether all that is computed for a row of float32 has the same bits whatever the others."""
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    # Torch computes what is left over from whole vectors in another way.
    if config.intermediate_size % VECTOR or heads * config.head_dim % VECTOR:
        return False
    shapes: set[tuple[int, ...]] = {(heads * config.head_dim, config.hidden_size)}
    for module in model.modules():
        if isinstance(module, Experts):
            if type(module) is not Experts or module.form != "fast":
                return False
            shapes |= {tuple(w.shape[1:]) for w in (module.gate_up_weight, module.down_weight)}
        elif isinstance(module, nn.Linear | Head | Router):
            if type(module) not in (nn.Linear, Head, Router):
                return False
            shapes.add(tuple(module.get_parameter("weight").shape))
    return all(_rows_are_apart(min(out, 4096), size) for out, size in sorted(shapes))


@cache
@torch.no_grad()
def _rows_are_apart(out: int, size: int) -> bool:
    """Whether products of a matrix of this shape give a row the same bits, tried with some."""
    draw = torch.Generator().manual_seed(0)
    blocks = _ordered(torch.randn(out, size, generator=draw))
    x = torch.randn(200, size, generator=draw)
    whole = _multiply(x, blocks, None)
    counts = (1, 2, 3, 4, 5, 8, 9, 16, 31, 64, 100)
    return all(torch.equal(_multiply(x[:n], blocks, None), whole[:n]) for n in counts)
