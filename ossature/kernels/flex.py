"""Attention with sinks on CUDA: FlexAttention under torch.compile, and its logsumexp.

FlexAttention is the one kernel of torch that carries the gradient through its logsumexp, so the
plain formula out * sigmoid(lse - sink) is exact here, sinks' gradient included.  The logsumexp,
the sinks and the factor stay fp32.  FlexAttention has no backward on CPU: the tests compare its
forward there, and the gradients on a GPU (tests/kernels/test_flex.py).
"""

import functools

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor, block_mask: BlockMask) -> Tensor:
    """As `ossature.model.attention.attend`, with a block mask in place of the mask.

    Args:
        q: (batch, seq, heads, head_dim); k and v: (batch, seq, kv_heads, head_dim).
        sinks: (heads,).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, aux = _flex(q.device.type)(
        q, k, v, block_mask=block_mask, enable_gqa=True, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    kept = torch.sigmoid(aux.lse.float() - sinks.float()[:, None])  # (batch, heads, seq)
    return (out * kept[..., None]).to(out.dtype).transpose(1, 2)


def flex_mask(run: Tensor, window: int | None) -> BlockMask:
    """Causal, within a document, within the window.

    Args:
        run: (batch, seq) number of the document of each token.
        window: tokens a query sees, its own included; None sees the whole document.
    """

    batch, seq = run.shape
    reach = seq if window is None else window
    return _create_block_mask(run.device.type)(
        lambda b, _head, query, key: (
            (key <= query) & (query - key < reach) & (run[b, query] == run[b, key])
        ),
        *(batch, None, seq, seq),
        device=run.device.type,
    )


def split_flex_mask(
    query_run: Tensor, query_place: Tensor, key_run: Tensor, key_place: Tensor, window: int | None
) -> BlockMask:
    """`flex_mask` of queries and keys that are two different choices of a row's tokens.

    Args:
        query_run, key_run: (batch, queries) and (batch, keys) numbers of the tokens' documents.
        query_place, key_place: (queries,) and (keys,) places in the row.
    """
    batch, queries = query_run.shape
    keys = key_run.shape[1]
    reach = 2**31 if window is None else window
    return _create_block_mask(query_run.device.type)(
        lambda b, _head, query, key: (
            (query_place[query] >= key_place[key])
            & (query_place[query] - key_place[key] < reach)
            & (query_run[b, query] == key_run[b, key])
        ),
        *(batch, None, queries, keys),
        device=query_run.device.type,
    )


@functools.cache
def _flex(device_type: str):
    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@functools.cache
def _create_block_mask(device_type: str):
    """Eager, it makes every pair of a query and a key, 10 bytes each: 172 GB for a long row."""
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask
