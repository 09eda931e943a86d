"""Attention with sinks on CPU, without a [seq, seq] matrix, with exact gradients.

A sink is one more logit in the softmax of its head, with no value behind it.  A flash kernel that
returns its logsumexp gives it for nothing: with `lse` the logsumexp over the keys,

    out' = out * sigmoid(lse - sink)        lse' = logaddexp(lse, sink)

is the output and the logsumexp of the softmax *with* the sink.  The stock backward of the kernel,
fed with (out', lse'), is then exact for q, k and v, and the sink's gradient is
-sum(exp(sink - lse') * <dout, out'>).  Differentiating the first formula by autograd is not the
same: most kernels, this one included, drop the gradient that comes through `lse`.

Both operations work on flattened tokens, (tokens, heads, head_dim), and are custom operators, so
that activation checkpointing can name them and torch.compile does not look inside.  The eager
twins are `attend` and `attention_mask` of `ossature.model.attention`; tests/model/test_attention.py
ties them, gradients included.
"""

import itertools

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def full_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention within each document, one flash call a document.

    Args:
        q: (tokens, heads, head_dim); k and v: (tokens, kv_heads, head_dim).
        sinks: (heads,), one logit per head.
        bounds: (documents + 1,) int64, on CPU: document n is the tokens bounds[n]:bounds[n + 1].
    """
    return torch.ops.ossature.full_attention(q, k, v, sinks, bounds)[0]


def window_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    """Attention to the last `window` tokens of the document; O(tokens x window) time and memory.

    Queries go in blocks as long as the window; a block sees its own keys and the block before.

    Args:
        q, k, v, sinks: as in `full_attention`.
        mask: `band_mask` of the tokens' documents.
    """
    return torch.ops.ossature.window_attention(q, k, v, sinks, mask)[0]


def band_mask(run: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """What each block of `window` queries sees of its own and the previous block's keys.

    Args:
        run: (tokens,) number of the document of each token, never decreasing.
        window: tokens a query sees, its own included.

    Returns:
        (blocks, 1, window, 2 * window), to be added to the logits: 0 if visible, else -inf.  The
        last block is filled up with tokens of no document.
    """
    blocks = -(-len(run) // window)
    filled = run.new_full((blocks * window,), -1)
    filled[: len(run)] = run
    own = filled.view(blocks, window)
    before = torch.cat([torch.full_like(own[:1], -2), own[:-1]])
    keys = torch.cat([before, own], dim=1)  # (blocks, 2 * window)
    place = torch.arange(2 * window, device=run.device)
    age = place[window:, None] - place  # tokens from key to query; negative in the future
    visible = (own[:, :, None] == keys[:, None, :]) & (age >= 0) & (age < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=run.device)
    return mask.masked_fill_(~visible, -torch.inf)[:, None]


@torch.library.custom_op("ossature::full_attention", mutates_args=(), device_types="cpu")
def _full(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))
    for span, rows in _spans(bounds):
        part, part_lse = _flash(
            _batch(q[span], rows), _batch(k[span], rows), _batch(v[span], rows), 0.0, True
        )
        part, part_lse = _with_sink(part, part_lse, sinks)
        _batch(out[span], rows).copy_(part)
        lse[:, span].unflatten(1, (rows, -1)).copy_(part_lse.transpose(0, 1))
    return out, lse


@torch.library.custom_op("ossature::full_attention_backward", mutates_args=(), device_types="cpu")
def _full_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bounds: Tensor,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for span, rows in _spans(bounds):
        part_lse = lse[:, span].unflatten(1, (rows, -1)).transpose(0, 1).contiguous()
        parts = _flash_backward(
            _batch(dout[span], rows), _batch(q[span], rows), _batch(k[span], rows),
            _batch(v[span], rows), _batch(out[span], rows), part_lse, 0.0, True,
        )  # fmt: skip
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _batch(whole[span], rows).copy_(part)
    return dq, dk, dv, _sink_gradient(dout, out, lse, sinks)


@torch.library.custom_op("ossature::window_attention", mutates_args=(), device_types="cpu")
def _window(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    block, tokens = mask.shape[2], q.shape[0]
    out, lse = _flash(
        _blocks(q, block), _pairs(k, block), _pairs(v, block), 0.0, False, attn_mask=mask
    )
    out, lse = _with_sink(out, lse, sinks)
    lse = lse.transpose(0, 1).flatten(1)[:, :tokens]  # (heads, tokens)
    return _tokens(out, tokens).contiguous(), lse.contiguous()


@torch.library.custom_op("ossature::window_attention_backward", mutates_args=(), device_types="cpu")
def _window_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    block, tokens = mask.shape[2], q.shape[0]
    # exp(logit - lse) of a query that fills up the last block is multiplied by its dout, which is
    # zero; its lse must only be finite and not small.
    filled = torch.nn.functional.pad(lse, (0, mask.shape[0] * block - tokens), value=1e4)
    block_lse = filled.unflatten(1, (-1, block)).transpose(0, 1).contiguous()
    dq, dk, dv = _flash_backward(
        _blocks(dout, block), _blocks(q, block), _pairs(k, block), _pairs(v, block),
        _blocks(out, block), block_lse, 0.0, False, attn_mask=mask,
    )  # fmt: skip
    dk, dv = (_fold(part, block, tokens) for part in (dk, dv))
    return _tokens(dq, tokens).contiguous(), dk, dv, _sink_gradient(dout, out, lse, sinks)


def _register(forward, backward) -> None:
    """Autograd and shapes of one of the two operators; both have (q, k, v, sinks, extra)."""

    @forward.register_fake
    def _(q, k, v, sinks, extra):
        return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))

    @backward.register_fake
    def _(dout, q, k, v, sinks, extra, out, lse):
        return tuple(torch.empty_like(x) for x in (q, k, v, sinks))

    def save(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)  # lse has none
        ctx.save_for_backward(*inputs, *output)

    def gradient(ctx, dout, _dlse):
        return *backward(dout.contiguous(), *ctx.saved_tensors), None

    forward.register_autograd(gradient, setup_context=save)


_register(_full, _full_backward)
_register(_window, _window_backward)


def _spans(bounds: Tensor) -> list[tuple[slice, int]]:
    """Slices of tokens with the number of equally long documents in each."""
    ends = bounds.tolist()
    lengths = {end - first for first, end in itertools.pairwise(ends)}
    if len(lengths) == 1:
        return [(slice(0, ends[-1]), len(ends) - 1)]
    return [(slice(first, end), 1) for first, end in itertools.pairwise(ends)]


def _batch(x: Tensor, rows: int) -> Tensor:
    return x.unflatten(0, (rows, -1)).transpose(1, 2)  # (rows, heads, length, head_dim)


def _filled(x: Tensor, block: int) -> Tensor:
    missing = -len(x) % block
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _blocks(x: Tensor, block: int) -> Tensor:
    return _filled(x, block).unflatten(0, (-1, block)).transpose(1, 2)


def _pairs(x: Tensor, block: int) -> Tensor:
    """(blocks, kv_heads, 2 * block, head_dim): the keys of the previous block, then its own."""
    own = _filled(x, block).unflatten(0, (-1, block))
    before = torch.cat([torch.zeros_like(own[:1]), own[:-1]])
    return torch.cat([before, own], dim=1).transpose(1, 2)


def _fold(pairs: Tensor, block: int, tokens: int) -> Tensor:
    """The adjoint of `_pairs`: each key was seen by its own block and by the next."""
    pairs = pairs.transpose(1, 2)
    whole = pairs[:, block:].contiguous()
    whole[:-1] += pairs[1:, :block]
    return whole.flatten(0, 1)[:tokens].contiguous()


def _tokens(blocks: Tensor, tokens: int) -> Tensor:
    return blocks.transpose(1, 2).flatten(0, 1)[:tokens]


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _with_sink(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    sink = sinks.to(lse.dtype)[:, None]
    # In fp32 whatever the dtype of out: a sigmoid of a bf16 lse is off by up to 3.5 %.
    return out.mul_(torch.sigmoid(lse - sink)[..., None]), torch.logaddexp(lse, sink)


def _sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # (heads, tokens)
    delta = (dout.to(lse.dtype) * out).sum(-1).mT
    return -(share * delta).sum(-1).to(sinks.dtype)
