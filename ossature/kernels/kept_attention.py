"""Attention with sinks to keys that were kept, without gradients: what sampling needs.

On CPU by torch's flash kernel, whose logsumexp gives the sink for nothing (see
`ossature.kernels.attention`).  The heads that share a key are handed to it as so many queries:
each key is read once.  Elsewhere one token at a time is a masked softmax, a prompt FlexAttention.

The eager twin is `attend` of `ossature.model.attention`; tests/kernels/test_kept_attention.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ossature.kernels.attention import _flash, band_mask, window_attention
from ossature.kernels.chunk_attention import chunk_attention
from ossature.kernels.flex import flex_attend, split_flex_mask


def attend_next(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, before: int, window: int | None
) -> Tensor:
    """Causal attention of the next tokens of a sequence.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (before + tokens, kv_heads, head_dim), in order.
        window: tokens a query sees, its own included; None sees all.
    """
    tokens, end = len(q), len(k)
    if q.device.type != "cpu":
        return _flex_next(q, k, v, sinks, before, window)
    if window is None or window >= end:
        return chunk_attention(q, k, v, sinks, torch.tensor([[0, tokens, 0, end]]))
    # Zeros for the queries of the tokens before: nobody reads what they find.
    filled = F.pad(q, (0, 0, 0, 0, before, 0))
    mask = band_mask(torch.zeros(end, dtype=torch.int64), window, q.dtype)
    return window_attention(filled, k, v, sinks, mask)[before:]


def attend_ring(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, used: Tensor) -> Tensor:
    """Attention of one token of each of several sequences to the keys in its ring.

    Args:
        q: (rows, heads, head_dim).
        k, v: (rows, slots, kv_heads, head_dim), in any order.
        used: (rows, slots) True for slots that hold a key.
    """
    if q.device.type != "cpu":
        return _masked(q, k, v, sinks, used)
    mask = torch.zeros(used.shape, dtype=q.dtype).masked_fill_(~used, -torch.inf)
    q = q.unflatten(1, (k.shape[2], -1))  # (rows, kv_heads, group, head_dim)
    return _sink(*_grouped_flash(q, k, v, mask[:, None, None]), sinks)


def attend_stretches(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, starts: list[int], lengths: list[int]
) -> Tensor:
    """Attention of one token of each of several sequences, the n-th to its stretch of a store.

    Args:
        q: (rows, heads, head_dim).
        k, v: (places, kv_heads, head_dim); row n sees places starts[n], ..., lengths[n] of them.
    """
    if q.device.type != "cpu":
        place = torch.arange(max(lengths), device=q.device)
        size = torch.tensor(lengths, device=q.device)[:, None]
        used = place < size
        place = torch.tensor(starts, device=q.device)[:, None] + torch.minimum(place, size - 1)
        return _masked(q, k[place], v[place], sinks, used)
    q = q.unflatten(1, (k.shape[1], -1))  # (rows, kv_heads, group, head_dim)
    outs, lses = [], []
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        span = slice(start, start + length)
        out, lse = _grouped_flash(q[n : n + 1], k[None, span], v[None, span], None)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return _sink(outs[0], lses[0], sinks)
    return _sink(torch.cat(outs), torch.cat(lses), sinks)


def _grouped_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _flash(q, k.transpose(1, 2), v.transpose(1, 2), 0.0, False, attn_mask=mask)


def _sink(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(rows, kv_heads, group, head_dim) -> (rows, heads, head_dim), with what the sinks take.

    Both are overwritten.  torch computes what is left over from whole vectors in another way, one
    number at a time, and the last bit may differ; so in float32 the numbers are filled up, and a
    row has the same bits in any batch.
    """
    kept = lse.sub_(sinks.to(lse.dtype).view(out.shape[1:3]))
    if out.dtype == torch.float32 and (size := kept.numel()) % VECTOR:
        kept = F.pad(kept.flatten(), (0, -size % VECTOR)).sigmoid_()[:size].view(lse.shape)
    else:
        kept.sigmoid_()
    return out.mul_(kept[..., None]).flatten(1, 2)


VECTOR = 64
"""Numbers that a vectorised loop of torch takes at a time, at most."""


def _masked(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, used: Tensor) -> Tensor:
    """The plain formula, with logits and softmax in fp32."""
    q = q.unflatten(1, (k.shape[2], -1))
    logits = torch.einsum("bhgd,bkhd->bhgk", q, k).float() * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~used[:, None, None], -torch.inf)
    sink = sinks.float().view(q.shape[1:3])[None, :, :, None].expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhgk,bkhd->bhgd", weights.to(v.dtype), v).flatten(1, 2)


def _flex_next(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, before: int, window: int | None
) -> Tensor:
    keys = torch.arange(len(k), device=q.device)
    run = torch.zeros_like(keys)[None]
    mask = split_flex_mask(run[:, before:], keys[before:], run, keys, window)
    return flex_attend(q[None], k[None], v[None], sinks=sinks, block_mask=mask)[0]
