"""Experts on tokens sorted by expert: one matrix product per expert or one grouped product.

Nothing is materialised per token: no weights, and one row of output per chosen expert.  What the
backward pass keeps is the rows and the two halves of the pre-activation; the activation is
computed again.  The routing weight is folded into the activation before the down projection,

    weight * (act @ down.T + bias) = (weight * act) @ down.T + weight * bias,

so that its gradient needs no copy of the output.

`grouped_experts` is a custom operator: activation checkpointing can name it, and the split sizes
it needs on the host (CPU only) do not break a compiled graph.  The eager twin is `eager_experts`
of `ossature.model.moe`; tests/model/test_moe.py ties them, gradients included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sort_by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Order of the (token, choice) pairs by expert, and the number of rows of each expert.

    Args:
        chosen: (tokens, k) experts of each token.

    Returns:
        order: (tokens * k,); row r of the sorted rows is pair order[r] of chosen.flatten().
        counts: (experts,) int64.
    """
    flat = chosen.flatten()
    # Not bincount: on CUDA that waits for the device.
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts


def dispatch(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Rows in the order of their experts: (tokens, hidden) -> (tokens * k, hidden)."""
    return _Dispatch.apply(x, order, k)


def combine(rows: Tensor, order: Tensor, k: int) -> Tensor:
    """Sum of the k rows of each token; the adjoint of `dispatch`."""
    return _Combine.apply(rows, order, k)


def grouped_experts(
    rows: Tensor,
    weights: Tensor,
    counts: Tensor,
    gate_up_weight: Tensor,
    gate_up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """Clamped SwiGLU experts on sorted rows, times the routing weights.

    Args:
        rows: (rows, hidden), sorted by expert; weights: (rows,).
        counts: (experts,) rows of each expert; on CUDA it is never read on the host.
        gate_up_weight: (experts, 2 * inner, hidden), rows alternate gate, up.
        down_weight: (experts, hidden, inner).
    """
    return torch.ops.ossature.experts(
        rows, weights, counts, gate_up_weight, gate_up_bias, down_weight, down_bias, alpha, limit
    )[0]


def few_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up_weight: Tensor,
    gate_up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    alpha: float,
    limit: float,
) -> Tensor:
    """All of it for few tokens, without gradients, on CPU: what one step of sampling needs.

    Only the products go expert by expert.  In float32 rows are filled up to a multiple of
    `FEW_ROWS`, with copies of one of the same expert: a token's result has then the same bits
    whatever other tokens there are (MKL multiplies fewer than four rows in another way).

    Args:
        x: (tokens, hidden); chosen, weights: (tokens, k).
        gate_up_weight ... down_bias: as in `grouped_experts`.
    """
    few = Few(chosen, 1 if x.dtype == torch.bfloat16 else FEW_ROWS)
    rows, weight = x[few.pair // few.k], weights.flatten()[few.pair, None]
    gate_up = rows.new_empty(len(rows), gate_up_bias.shape[1])
    for expert, span in few.spans:
        torch.mm(rows[span], gate_up_weight[expert].mT, out=gate_up[span])
    gate_up += gate_up_bias[few.expert]
    inner = _activate(gate_up[:, 0::2], gate_up[:, 1::2], alpha, limit).mul_(weight / alpha)
    out = torch.empty_like(rows)
    for expert, span in few.spans:
        torch.mm(inner[span], down_weight[expert].mT, out=out[span])
    out.addcmul_(down_bias[few.expert], weight)
    return few.combine(out)


FEW_ROWS = 8


class Few:
    """Rows of few tokens, sorted by expert and filled up; made on the host.

    Args:
        chosen: (tokens, k) experts of each token.
        multiple: the rows of each expert are filled up to a multiple of it.
    """

    def __init__(self, chosen: Tensor, multiple: int) -> None:
        self.k = chosen.shape[1]
        members: dict[int, list[int]] = {}
        for pair, expert in enumerate(chosen.flatten().tolist()):
            members.setdefault(expert, []).append(pair)
        pairs, experts, place = [], [], [0] * chosen.numel()
        self.spans: list[tuple[int, slice]] = []
        """The experts that have rows, and which."""
        for expert, own in members.items():
            start = len(pairs)
            for row, pair in enumerate(own):
                place[pair] = start + row
            filled = own + own[:1] * (-len(own) % multiple)
            pairs += filled
            experts += [expert] * len(filled)
            self.spans.append((expert, slice(start, len(pairs))))
        self.pair = torch.tensor(pairs, dtype=torch.int64)
        """Of chosen.flatten(), for each row."""
        self.expert = torch.tensor(experts, dtype=torch.int64)
        """Of each row."""
        self.place = torch.tensor(place, dtype=torch.int64)
        """The row of each of chosen.flatten()."""

    def combine(self, rows: Tensor) -> Tensor:
        """Sum of the k rows of each token."""
        return rows[self.place].unflatten(0, (-1, self.k)).sum(1)


def _gather_sum(rows: Tensor, order: Tensor, k: int) -> Tensor:
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows[place].unflatten(0, (-1, k)).sum(1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x[order // k]

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (order,) = ctx.saved_tensors
        return _gather_sum(grads[0], order, ctx.k), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _gather_sum(rows, order, k)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (order,) = ctx.saved_tensors
        return grads[0][order // ctx.k], None, None


@torch.library.custom_op("ossature::experts", mutates_args=())
def _experts(
    rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, alpha: float, limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output rows, gate and up."""
    run = _grouped if _has_grouped_product(rows) else _loop
    return run(
        rows, weights, counts, gate_up_weight, gate_up_bias, down_weight, down_bias, alpha, limit
    )


@torch.library.custom_op("ossature::experts_backward", mutates_args=())
def _experts_backward(
    dout: Tensor, rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor,
    gate_up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, gate: Tensor, up: Tensor,
    alpha: float, limit: float, frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of rows, weights and the four parameters (empty ones if the experts are frozen)."""
    run = _grouped_backward if _has_grouped_product(rows) else _loop_backward
    return run(
        dout, rows, weights, counts, gate_up_weight, gate_up_bias, down_weight, down_bias, gate, up,
        alpha, limit, frozen,
    )  # fmt: skip


def _has_grouped_product(rows: Tensor) -> bool:
    """torch's grouped product is for bfloat16 on CUDA; everything else goes expert by expert."""
    return rows.is_cuda and rows.dtype == torch.bfloat16


@_experts.register_fake
def _(rows, weights, counts, gate_up_weight, gate_up_bias, down_weight, down_bias, alpha, limit):
    inner = rows.new_empty(rows.shape[0], down_weight.shape[2])
    return torch.empty_like(rows), inner, torch.empty_like(inner)


@_experts_backward.register_fake
def _(
    dout, rows, weights, counts, gate_up_weight, gate_up_bias, down_weight, down_bias, gate, up,
    alpha, limit, frozen,
):  # fmt: skip
    parameters = gate_up_weight, gate_up_bias, down_weight, down_bias
    grads = (rows.new_empty(0) if frozen else torch.empty_like(x) for x in parameters)
    return torch.empty_like(rows), torch.empty_like(weights), *grads


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.alpha, ctx.limit = inputs
    _, gate, up = output
    ctx.set_materialize_grads(False)  # gate and up have none: no zeros as large as they are
    ctx.save_for_backward(*tensors, gate, up)


def _gradient(ctx, dout, _dgate, _dup):
    rows, weights, counts, *parameters, gate, up = ctx.saved_tensors
    frozen = not any(ctx.needs_input_grad[3:7])
    drows, dweights, *dparameters = _experts_backward(
        dout.contiguous(), rows, weights, counts, *parameters, gate, up, ctx.alpha, ctx.limit,
        frozen,
    )  # fmt: skip
    if frozen:
        dparameters = [None] * 4
    return drows, dweights, None, *dparameters, None, None


_experts.register_autograd(_gradient, setup_context=_save)


def _grouped(
    rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, alpha: float, limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One grouped product for all experts, without a look at the counts."""
    ends = counts.cumsum(0, dtype=torch.int32)
    expert = expert_of_rows(counts, len(rows))
    gate_up = F.grouped_mm(rows, gate_up_weight.mT, offs=ends) + gate_up_bias[expert]
    gate, up = gate_up[:, 0::2].contiguous(), gate_up[:, 1::2].contiguous()
    inner = _activate(gate, up, alpha, limit).mul_(weights[:, None] / alpha)
    out = F.grouped_mm(inner, down_weight.mT, offs=ends)
    return out.add_(down_bias[expert] * weights[:, None]), gate, up


def _grouped_backward(
    dout: Tensor, rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor,
    gate_up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, gate: Tensor, up: Tensor,
    alpha: float, limit: float, frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ends = counts.cumsum(0, dtype=torch.int32)
    expert = expert_of_rows(counts, len(rows))
    inner = _activate(gate, up, alpha, limit)
    dinner = F.grouped_mm(dout, down_weight, offs=ends)
    dweights = (dinner * inner).sum(-1) / alpha + (dout * down_bias[expert]).sum(-1)
    weight = weights[:, None] / alpha
    dgate, dup = _activate_backward(dinner.mul_(weight), gate, up, alpha, limit)
    dgate_up = torch.stack([dgate, dup], dim=-1).flatten(1)
    drows = F.grouped_mm(dgate_up, gate_up_weight, offs=ends)
    if frozen:
        none = rows.new_empty(0)
        return drows, dweights, none, none.clone(), none.clone(), none.clone()
    dgate_up_weight = F.grouped_mm(dgate_up.mT, rows, offs=ends)
    dgate_up_bias = torch.zeros_like(gate_up_bias).index_add_(0, expert, dgate_up)
    ddown_weight = F.grouped_mm(dout.mT, inner.mul_(weight), offs=ends)
    ddown_bias = torch.zeros_like(down_bias).index_add_(0, expert, dout * weights[:, None])
    return drows, dweights, dgate_up_weight, dgate_up_bias, ddown_weight, ddown_bias


def _loop(
    rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, alpha: float, limit: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One product after the other, each expert's rows while they are in the cache."""
    # Results go to padded windows in ascending order: what a window writes past its own rows is
    # overwritten by the experts they belong to.
    inner_size, spare = down_weight.shape[2], len(rows) + _ROUND
    gate, up = rows.new_empty(spare, inner_size), rows.new_empty(spare, inner_size)
    out = rows.new_empty(spare, rows.shape[1])
    for expert, start, count in _used_experts(counts):
        span, window = slice(start, start + count), slice(start, start + _padded(count))
        x = _cut(rows, window)
        # Every second row of gate_up is the gate's: a stride, not a copy.
        for half, part in enumerate((gate, up)):
            bias, weight = gate_up_bias[expert, half::2], gate_up_weight[expert, half::2]
            torch.addmm(bias, x, weight.mT, out=part[window])
        inner = _activate(gate[window], up[window], alpha, limit)
        inner[:count].mul_(weights[span, None] / alpha)
        torch.mm(inner, down_weight[expert].mT, out=out[window])
        out[span].addcmul_(down_bias[expert], weights[span, None])
    return out[: len(rows)], gate[: len(rows)], up[: len(rows)]


def _loop_backward(
    dout: Tensor, rows: Tensor, weights: Tensor, counts: Tensor, gate_up_weight: Tensor,
    gate_up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, gate: Tensor, up: Tensor,
    alpha: float, limit: float, frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    drows, dweights = rows.new_empty(len(rows) + _ROUND, rows.shape[1]), torch.empty_like(weights)
    parameters = gate_up_weight, gate_up_bias, down_weight, down_bias
    dgate_up_weight, dgate_up_bias, ddown_weight, ddown_bias = (
        rows.new_empty(0) if frozen else torch.empty_like(x) for x in parameters
    )
    if not frozen:
        for unused in (counts == 0).nonzero().flatten().tolist():
            for gradient in (dgate_up_weight, dgate_up_bias, ddown_weight, ddown_bias):
                gradient[unused] = 0
    for expert, start, count in _used_experts(counts):
        span, window = slice(start, start + count), slice(start, start + _padded(count))
        weight = weights[span, None] / alpha
        dy, g, u = (_cut(x, window) for x in (dout, gate, up))
        inner = _activate(g, u, alpha, limit)
        dinner = dy @ down_weight[expert]
        dweights[span] = (dinner[:count] * inner[:count]).sum(-1) / alpha
        dweights[span] += (dy[:count] * down_bias[expert]).sum(-1)
        dinner[:count].mul_(weight)
        dinner[count:] = 0  # rows of the next experts, or of none
        dgate, dup = _activate_backward(dinner, g, u, alpha, limit)
        torch.mm(dgate, gate_up_weight[expert, 0::2], out=drows[window])
        drows[window].addmm_(dup, gate_up_weight[expert, 1::2])
        if frozen:
            continue
        x = _cut(rows, window)
        for half, part in enumerate((dgate, dup)):
            torch.mm(part.mT, x, out=dgate_up_weight[expert, half::2])
            dgate_up_bias[expert, half::2] = part.sum(0)
        inner[:count].mul_(weight)
        inner[count:] = 0
        torch.mm(dy.mT, inner, out=ddown_weight[expert])
        ddown_bias[expert] = (dy[:count] * weights[span, None]).sum(0)
    return drows[: len(rows)], dweights, dgate_up_weight, dgate_up_bias, ddown_weight, ddown_bias


def _activate(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """alpha times `ossature.model.moe.swiglu`, on the two halves."""
    act = F.silu(gate.clamp(max=limit).mul_(alpha), inplace=True)
    return act.mul_(up.clamp(-limit, limit).add_(1))


def _activate_backward(
    dinner: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up for that of `_activate`; a clamp passes it at the limit too."""
    # hardtanh_backward passes values strictly inside its bounds.
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    bound = float(torch.tensor(limit, dtype=wide).nextafter(torch.tensor(torch.inf, dtype=wide)))
    scaled = gate.clamp(max=limit).mul_(alpha)
    shifted = up.clamp(-limit, limit).add_(1).mul_(dinner)
    dgate = torch.ops.aten.silu_backward(shifted, scaled).mul_(alpha)
    dup = F.silu(scaled, inplace=True).mul_(dinner)
    clamp_backward = torch.ops.aten.hardtanh_backward
    return clamp_backward(dgate, gate, -torch.inf, bound), clamp_backward(dup, up, -bound, bound)


# The CPU's matrix products are prepared once per shape, which takes as long as a small product and
# keeps a megabyte: the numbers of rows are rounded up to few values.
_ROUND = 64


def _padded(count: int) -> int:
    """At least `FEW_ROWS`: fewer are multiplied in another way, and their bits would differ."""
    return -(-count // _ROUND) * _ROUND if count > FEW_ROWS else FEW_ROWS


def _cut(x: Tensor, window: slice) -> Tensor:
    """x[window], filled up with zeros where the window goes past the end."""
    missing = window.stop - len(x)
    return x[window] if missing <= 0 else F.pad(x[window], (0, 0, 0, missing))


def _used_experts(counts: Tensor) -> list[tuple[int, int, int]]:
    """Expert, its first row and its number of rows, for every expert that has any."""
    used, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            used.append((expert, start, count))
        start += count
    return used


def expert_of_rows(counts: Tensor, rows: int) -> Tensor:
    """(rows,) the expert of each sorted row."""
    return torch.repeat_interleave(counts, output_size=rows)
