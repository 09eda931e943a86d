"""A frozen matrix per expert with a trainable adapter of low rank beside it, on sorted rows.

    y = gain * (x @ W.T + scale * (x' @ A.T) @ B.T) + bias

for the W, A, B, gain and bias of each row's expert.  W gets no gradient, and so nothing of x is
kept for it.  It may be packed in MXFP4; it is then unpacked when it is needed, in the forward pass
and again in the backward pass: on CPU one expert at a time, on CUDA all of a layer's, but for the
few rows of a step of sampling, whose product reads the packed bytes.  W + B @ A is never made, but
for the norms that DoRA divides by: one expert at a time.

`adapted_linear` is a custom operator, so that activation checkpointing can name it.  Its
specification is `ossature.model.frozen_experts.merged`; tests/model/test_lora.py ties the two.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from ossature.kernels.experts import (
    _ROUND,
    _activate,
    _activate_backward,
    _cut,
    _has_grouped_product,
    _padded,
    _used_experts,
    expert_of_rows,
)
from ossature.kernels.mxfp4 import dequantize

PART_ROWS = 64
"""Rows that go through an activation at a time on a CPU."""
FEW_ROWS = 16
"""Up to so many for each expert on average, packed experts on CUDA are multiplied as they are."""
HAS_TRITON = importlib.util.find_spec("triton") is not None
"""It comes with torch for CUDA on Linux."""


def unpack(weight: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(..., out, in) in `dtype`; of a plain weight, or of blocks and scales.

    Args:
        weight: (..., out, in), or with scales MXFP4 blocks (..., out, groups, 16).
        scales: (..., groups, out): rows come last, so that both can be viewed as 16-bit numbers.
    """
    if scales is not None:
        weight = dequantize(weight, scales.mT)
    return weight.to(dtype)


def adapted_linear(
    rows: Tensor,
    counts: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor,
    row_weights: Tensor | None,
    low: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gain: Tensor | None,
    scale: float,
) -> Tensor:
    """Rows times their expert's adapted matrix; (rows, in) -> (rows, out).

    Args:
        rows: (rows, in), sorted by expert; counts: (experts,) rows of each.
        weight, scales: as for `unpack`, with experts first; no gradient.
        bias: (experts, out); no gradient.
        row_weights: (rows,), by which each row's bias is multiplied.
        low: (rows, in) what goes through the adapter, if it is not `rows`: with some dropped.
        a: (experts, rank, in); b: (experts, out, rank).
        gain: (experts, out), for each row of the adapted matrix.
    """
    return torch.ops.ossature.adapted_linear(
        rows, counts, weight, scales, bias, row_weights, low, a, b, gain, scale
    )[0]


def weighted_swiglu(gate_up: Tensor, weights: Tensor, alpha: float, limit: float) -> Tensor:
    """`ossature.model.moe.swiglu` times the routing weight of each row; keeps only its inputs."""
    return _WeightedSwiGLU.apply(gate_up, weights, alpha, limit)


def row_squares(
    weight: Tensor, scales: Tensor | None, a: Tensor, b: Tensor, scale: float, counts: Tensor | None
) -> Tensor:
    """Sum of squares of every row of W + scale * B @ A, (experts, out), in fp32; no gradient.

    Args:
        counts: experts without rows may be left out: theirs are one.
    """
    with torch.no_grad():
        return torch.ops.ossature.row_squares(weight, scales, a, b, scale, counts)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, weights: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.alpha, ctx.limit = alpha, limit
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for part in _parts(gate_up):
            inner = _halves_activated(gate_up[part], alpha, limit)[2]
            torch.mul(inner, weights[part, None] / alpha, out=out[part])
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dout,), (gate_up, weights) = grads, ctx.saved_tensors
        dgate_up, dweights = torch.empty_like(gate_up), torch.empty_like(weights)
        for part in _parts(gate_up):
            gate, up, inner = _halves_activated(gate_up[part], ctx.alpha, ctx.limit)
            dweights[part] = inner.mul_(dout[part]).sum(-1) / ctx.alpha
            dinner = dout[part] * (weights[part, None] / ctx.alpha)
            both = _activate_backward(dinner, gate, up, ctx.alpha, ctx.limit)
            dgate_up[part, 0::2], dgate_up[part, 1::2] = both
        return dgate_up, dweights, None, None


def _parts(rows: Tensor) -> list[slice]:
    """Rows worked on at a time: on a CPU few, so that their copies fit its cache.

    A compiler cuts its loops itself, and would write out one of a number of rows that it is told.
    """
    if rows.is_cuda or torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + PART_ROWS) for start in range(0, len(rows), PART_ROWS)]


def _halves_activated(gate_up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate_up[:, 0::2].contiguous(), gate_up[:, 1::2].contiguous()
    return gate, up, _activate(gate, up, alpha, limit)


@torch.library.custom_op("ossature::row_squares", mutates_args=())
def _row_squares(
    weight: Tensor, scales: Tensor | None, a: Tensor, b: Tensor, scale: float, counts: Tensor | None
) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = torch.ones(b.shape[:2], dtype=wide, device=b.device)
    # On CUDA the host does not know which experts have rows.
    known = counts is not None and not counts.is_cuda
    used = [e for e, _, _ in _used_experts(counts)] if known else range(len(b))  # pyright: ignore
    for e in used:
        whole = unpack(weight[e], None if scales is None else scales[e], wide)
        whole = torch.addmm(whole, b[e].to(wide), a[e].to(wide), alpha=scale)
        torch.linalg.vector_norm(whole, dim=-1, out=out[e])
    return out.square_()


@_row_squares.register_fake
def _(weight, scales, a, b, scale, counts):
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return torch.empty(b.shape[:2], dtype=wide, device=b.device)


@torch.library.custom_op("ossature::adapted_linear", mutates_args=())
def _adapted(
    rows: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output rows; x' @ A.T; and what the gain multiplies, if there is one."""
    run = _grouped if _has_grouped_product(rows) else _loop
    return run(rows, counts, weight, scales, bias, row_weights, low, a, b, gain, scale)


@torch.library.custom_op("ossature::adapted_linear_backward", mutates_args=())
def _adapted_backward(
    dout: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, small: Tensor, plain: Tensor, scale: float, need_rows: bool, apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows, row_weights, low, a, b and gain; empty where there is none.

    Args:
        apart: `low` was not `rows`, and has a gradient of its own.
    """
    run = _grouped_backward if _has_grouped_product(dout) else _loop_backward
    return run(
        dout, counts, weight, scales, bias, row_weights, low, a, b, gain, small, plain, scale,
        need_rows, apart,
    )  # fmt: skip


def _inputs(weight: Tensor, scales: Tensor | None) -> int:
    return weight.shape[2] if scales is None else 2 * weight.shape[2] * weight.shape[3]


@_adapted.register_fake
def _(rows, counts, weight, scales, bias, row_weights, low, a, b, gain, scale):
    out = rows.new_empty(rows.shape[0], bias.shape[1])
    rank = 0 if a is None else a.shape[1]
    rank += -rank % 8 if _has_grouped_product(rows) else 0  # as `_aligned` leaves it
    small = rows.new_empty(rows.shape[0], rank)
    return out, small, torch.empty_like(out) if gain is not None else rows.new_empty(0)


@_adapted_backward.register_fake
def _(
    dout, counts, weight, scales, bias, row_weights, low, a, b, gain, small, plain, scale,
    need_rows, apart,
):  # fmt: skip
    rows = dout.new_empty(dout.shape[0], _inputs(weight, scales))
    none = dout.new_empty(0)
    return (
        rows if need_rows else none.clone(),
        none.clone() if row_weights is None else torch.empty_like(row_weights),
        torch.empty_like(rows) if apart else none.clone(),
        none.clone() if a is None else torch.empty_like(a),
        none.clone() if b is None else torch.empty_like(b),
        none.clone() if gain is None else torch.empty_like(gain),
    )


def _save(ctx, inputs, output) -> None:
    rows, *tensors, low, a, b, gain, ctx.scale = inputs
    _, small, plain = output
    ctx.apart = low is not None
    if a is not None and low is None:
        low = rows
    ctx.save_for_backward(*tensors, low, a, b, gain, small, plain)


def _gradient(ctx, dout, _dsmall, _dplain):
    need = ctx.needs_input_grad
    drows, dweights, dlow, da, db, dgain = _adapted_backward(
        dout.contiguous(), *ctx.saved_tensors, ctx.scale, need[0], ctx.apart
    )
    # In the order of the inputs; there is a gradient for what asks for one.
    grads = [drows, None, None, None, None, dweights, dlow, da, db, dgain, None]
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


_adapted.register_autograd(_gradient, setup_context=_save)


def _loop(
    rows: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One expert after the other; windows of rows as in `ossature.kernels.experts`."""
    spare, size = len(rows) + _ROUND, bias.shape[1]
    out, rank = rows.new_empty(spare, size), 0 if a is None else a.shape[1]
    small = rows.new_empty(spare, rank)
    plain = rows.new_empty((spare, size) if gain is not None else 0)
    for expert, start, count in _used_experts(counts):
        span, window = slice(start, start + count), slice(start, start + _padded(count))
        x, y = _cut(rows, window), out[window]
        torch.mm(x, _expert(weight, scales, expert, rows.dtype).mT, out=y)
        if a is not None and b is not None:
            x = x if low is None else _cut(low, window)
            torch.mm(x, a[expert].mT, out=small[window])
            y.addmm_(small[window], b[expert].mT, alpha=scale)
        if gain is not None:
            plain[window] = y
            y.mul_(gain[expert])
        if row_weights is None:
            y[:count].add_(bias[expert])
        else:
            y[:count].addcmul_(bias[expert], row_weights[span, None])
    end = len(rows)
    return out[:end], small[:end], plain[:end]


def _loop_backward(
    dout: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, small: Tensor, plain: Tensor, scale: float, need_rows: bool, apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    spare, size = len(dout) + _ROUND, _inputs(weight, scales)
    drows = dout.new_empty((spare, size) if need_rows else (spare, 0))
    dlow = dout.new_empty((spare, size) if apart else (spare, 0))
    dweights, da, db, dgain = (
        dout.new_empty(0) if x is None else torch.zeros_like(x) for x in (row_weights, a, b, gain)
    )
    for expert, start, count in _used_experts(counts):
        span, window = slice(start, start + count), slice(start, start + _padded(count))
        dy = _cut(dout, window)
        if row_weights is not None:
            dweights[span] = (dy[:count] * bias[expert]).sum(-1)
        if gain is not None:
            dgain[expert] = (dy[:count] * plain[span]).sum(0)
            dy = dy * gain[expert]
        if need_rows:
            # Not by name: it would live on while the next expert is unpacked.
            torch.mm(dy, _expert(weight, scales, expert, dout.dtype), out=drows[window])
        if a is None or b is None or low is None:
            continue
        dsmall = torch.mm(dy, b[expert]).mul_(scale)
        dsmall[count:] = 0  # rows of the next experts, or of none
        kept = _cut(small, window).clone()
        kept[count:] = 0
        torch.mm(dsmall.mT, _cut(low, window), out=da[expert])
        torch.mm(dy.mT, kept, out=db[expert]).mul_(scale)
        if apart:
            torch.mm(dsmall, a[expert], out=dlow[window])
        elif need_rows:
            drows[window].addmm_(dsmall, a[expert])
    end = len(dout)
    return drows[:end], dweights, dlow[:end], da, db, dgain


def _expert(weight: Tensor, scales: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor:
    return unpack(weight[expert], None if scales is None else scales[expert], dtype)


def _grouped(
    rows: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One grouped product for all experts, without a look at the counts."""
    ends = counts.cumsum(0, dtype=torch.int32)
    expert = expert_of_rows(counts, len(rows))
    if scales is not None and len(rows) <= FEW_ROWS * len(weight) and HAS_TRITON:
        from ossature.kernels.packed_product import packed_product

        out = packed_product(rows, counts, weight, scales)
    else:
        out = F.grouped_mm(rows, unpack(weight, scales, rows.dtype).mT, offs=ends)
    small = rows.new_empty(len(rows), 0)
    if a is not None and b is not None:
        a, b = _aligned(a, 1), _aligned(b, 2)
        small = F.grouped_mm(rows if low is None else low, a.mT, offs=ends)
        out.add_(F.grouped_mm(small, b.mT, offs=ends), alpha=scale)
    plain = rows.new_empty(0)
    if gain is not None:
        plain = out
        out = out * gain[expert]
    rest = bias[expert]
    return out.add_(rest if row_weights is None else rest.mul_(row_weights[:, None])), small, plain


def _grouped_backward(
    dout: Tensor, counts: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor,
    row_weights: Tensor | None, low: Tensor | None, a: Tensor | None, b: Tensor | None,
    gain: Tensor | None, small: Tensor, plain: Tensor, scale: float, need_rows: bool, apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ends = counts.cumsum(0, dtype=torch.int32)
    expert = expert_of_rows(counts, len(dout))
    drows, dweights, dlow, da, db, dgain = (dout.new_empty(0) for _ in range(6))
    if row_weights is not None:
        dweights = (dout * bias[expert]).sum(-1)
    if gain is not None:
        dgain = torch.zeros_like(gain).index_add_(0, expert, dout * plain)
        dout = dout * gain[expert]
    if need_rows:
        drows = F.grouped_mm(dout, unpack(weight, scales, dout.dtype), offs=ends)
    if a is not None and b is not None and low is not None:
        rank = a.shape[1]
        a, b = _aligned(a, 1), _aligned(b, 2)
        dsmall = F.grouped_mm(dout, b, offs=ends).mul_(scale)
        da = F.grouped_mm(dsmall.mT, low, offs=ends)[:, :rank].contiguous()
        db = F.grouped_mm(dout.mT, small, offs=ends)[:, :, :rank].mul_(scale).contiguous()
        back = F.grouped_mm(dsmall, a, offs=ends)
        if apart:
            dlow = back
        elif need_rows:
            drows = drows.add_(back)
    return drows, dweights, dlow, da, db, dgain


def _aligned(x: Tensor, dim: int) -> Tensor:
    """Filled up with zeros to a multiple of 8 along the rank: grouped products want 16 bytes."""
    missing = -x.shape[dim] % 8
    if not missing:
        return x.contiguous()
    return F.pad(x, (0, 0, 0, missing) if dim == 1 else (0, missing))
