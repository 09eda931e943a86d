"""Attention of some tokens of a row to a longer range of its keys, on CPU: for split sequences.

A rank that holds only a chunk of a sequence has queries q[s:e] of a document that began at b <= s.
They see all keys [b, s) and, causally, their own [s, e).  torch's CPU flash kernel aligns causality
to the first key, so this takes two calls, one not causal and one causal, merged exactly by their
logsumexps.  The sink is applied once, after the merge; and as in `ossature.kernels.attention` the
stock backward of each call, fed with the merged (out', lse'), is exact.  No [seq, seq] matrix.
"""

import torch
from torch import Tensor

from ossature.kernels.attention import (
    _batch,
    _flash,
    _flash_backward,
    _lse_dtype,
    _register,
    _sink_gradient,
    _with_sink,
)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pieces: Tensor) -> Tensor:
    """Causal attention of pieces of documents to all of the document before them.

    Args:
        q: (tokens, heads, head_dim).
        k, v: (keys, kv_heads, head_dim).
        sinks: (heads,), one logit per head.
        pieces: (pieces, 4) int64, on CPU: the first query of a piece and the one after its last,
            the first key of its document and the one after its last query's own.  The pieces
            cover every query once.
    """
    return torch.ops.ossature.chunk_attention(q, k, v, sinks, pieces)[0]


@torch.library.custom_op("ossature::chunk_attention", mutates_args=(), device_types="cpu")
def _chunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_lse_dtype(q))
    for queries, ranges in _ranges(pieces):
        mine = _batch(q[queries], 1)
        part, part_lse = None, None
        for keys, causal in ranges:
            found, found_lse = _flash(mine, _batch(k[keys], 1), _batch(v[keys], 1), 0.0, causal)
            found = found.to(_lse_dtype(q))
            if part is None or part_lse is None:
                part, part_lse = found, found_lse
            else:
                # A mean of the two, weighted by what each takes of the whole softmax.
                part.lerp_(found, torch.sigmoid(found_lse - part_lse)[..., None])
                part_lse = torch.logaddexp(part_lse, found_lse)
        assert part is not None and part_lse is not None
        part, part_lse = _with_sink(part, part_lse, sinks)
        _batch(out[queries], 1).copy_(part)
        lse[:, queries] = part_lse[0]
    return out, lse


@torch.library.custom_op("ossature::chunk_attention_backward", mutates_args=(), device_types="cpu")
def _chunk_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, pieces: Tensor,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # A key is seen by several pieces: their gradients are added up in fp32.
    dq, dk, dv = (torch.zeros_like(x, dtype=_lse_dtype(q)) for x in (q, k, v))
    for queries, ranges in _ranges(pieces):
        mine = [_batch(x[queries], 1) for x in (dout, q, out)]
        part_lse = lse[None, :, queries].contiguous()
        for keys, causal in ranges:
            parts = _flash_backward(
                mine[0], mine[1], _batch(k[keys], 1), _batch(v[keys], 1), mine[2], part_lse,
                0.0, causal,
            )  # fmt: skip
            for whole, part in zip((dq[queries], dk[keys], dv[keys]), parts, strict=True):
                _batch(whole, 1).add_(part)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), _sink_gradient(dout, out, lse, sinks)


_register(_chunk, _chunk_backward)


def _ranges(pieces: Tensor) -> list[tuple[slice, list[tuple[slice, bool]]]]:
    """Queries of each piece, with the ranges of keys they see; True: causally."""
    found = []
    for first, end, begin, last in pieces.tolist():
        own = last - (end - first)
        ranges = [(slice(own, last), True)]
        if begin < own:
            ranges.append((slice(begin, own), False))
        found.append((slice(first, end), ranges))
    return found
