"""Grouped-query attention with learned sinks, over a window or over the whole document.

`attend` with `attention_mask` is the specification.  `fast_attend` computes the same without a
[seq, seq] matrix: on CPU by `ossature.kernels.attention`, on CUDA by FlexAttention.

Window and causality go by place in the row, never by `position`: that is for RoPE alone.

Source: gpt_oss/torch/model.py of openai/gpt-oss@7b58334; compared with transformers in
tests/model/test_transformer.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from ossature.kernels.attention import band_mask, full_attention, window_attention
from ossature.kernels.flex import flex_attend, flex_mask
from ossature.model.cache import Prompt, Step
from ossature.model.config import ModelConfig
from ossature.model.rope import Rotation, rotate

Form = Literal["eager", "fast"]


class Sinks(nn.Module):
    """One learned logit per query head; a module of its own, so that a plan can name it."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))

    def forward(self) -> Float[Tensor, " heads"]:
        return self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, form: Form) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.layer, self.window = layer, config.window(layer)
        self.form: Form = form
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, key_size)
        self.v_proj = nn.Linear(config.hidden_size, key_size)
        self.sinks = Sinks(config.num_attention_heads)
        self.o_proj = nn.Linear(query_size, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rotation: Rotation,
        layout: Layout | Prompt | Step,
    ) -> Float[Tensor, "batch seq hidden"]:
        q, k, v = self.project(x, rotation)
        if not isinstance(layout, Layout):
            heads = layout.attend(self.layer, q, k, v, self.sinks())
        elif self.form == "eager":
            heads = attend(q, k, v, sinks=self.sinks(), mask=layout.mask(self.window))
        else:
            heads = layout.attend(q, k, v, sinks=self.sinks(), window=self.window)
        return self.o_proj(heads.flatten(-2))

    def project(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Rotation
    ) -> tuple[Float[Tensor, "batch seq heads head_dim"], Tensor, Tensor]:
        """Queries, keys and values; the last two are (batch, seq, kv_heads, head_dim)."""
        # -1 and not a head count: a tensor-parallel rank holds only some of the heads.
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rotation)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), rotation)
        return q, k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def prepare(self, layout: Layout, dtype: torch.dtype) -> None:
        """Let the layout make what this layer asks of it; see `Layout.prepare`."""
        if self.form == "eager":
            layout.mask(self.window)
        else:
            layout.prepare(self.window, dtype)


def attend(
    q: Float[Tensor, "batch seq heads head_dim"],
    k: Float[Tensor, "batch kv_seq kv_heads head_dim"],
    v: Float[Tensor, "batch kv_seq kv_heads head_dim"],
    *,
    sinks: Float[Tensor, " heads"],
    mask: Bool[Tensor, "batch seq kv_seq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Softmax attention in which every head may also attend to nothing.

    A sink is one more logit in the softmax of its head, with no value behind it: it takes
    probability away from the keys, so a head's weights sum to less than one.

    This eager form is the specification: it holds all (batch, heads, seq, kv_seq) logits at once.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask[:, None], -torch.inf)
    sink = sinks.to(q.dtype)[:, None, None].expand(*logits.shape[:-1], 1)  # (batch, heads, seq, 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def fast_attend(
    q: Float[Tensor, "batch seq heads head_dim"],
    k: Float[Tensor, "batch seq kv_heads head_dim"],
    v: Float[Tensor, "batch seq kv_heads head_dim"],
    *,
    sinks: Float[Tensor, " heads"],
    layout: Layout,
    window: int | None,
) -> Float[Tensor, "batch seq heads head_dim"]:
    """`attend` with the mask of `layout`, in memory O(seq), in time O(seq x window) if windowed.

    Args:
        window: tokens a query sees, its own included; None sees the whole document.
    """
    if q.device.type != "cpu":
        return flex_attend(q, k, v, sinks=sinks, block_mask=layout.block_mask(window))
    rows = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (tokens, heads, head_dim)
    if window is None or window >= layout.longest:
        out = full_attention(q, k, v, sinks, layout.bounds)
    else:
        out = window_attention(q, k, v, sinks, layout.band(window, q.dtype))
    return out.unflatten(0, rows)


def attention_mask(
    document: Int[Tensor, "batch seq"], window: int | None
) -> Bool[Tensor, "batch seq seq"]:
    """True where a query (dim 1) may see a key (dim 2): earlier, same document, in the window.

    Args:
        document: number of the document each token of a packed row belongs to.
        window: tokens a query sees, its own included; None sees the whole document.
    """
    age = torch.arange(document.shape[1], device=document.device)
    age = age[:, None] - age[None, :]  # tokens from key to query; negative in the future
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    return visible & (document[:, :, None] == document[:, None, :])


class Layout:
    """Which tokens of a batch may see which: made once a forward pass, shared by all layers.

    A document is a run of equal ids in a row; the same id after another one is a new document.
    Each attention form takes what it needs, computed once.
    """

    def __init__(self, document: Int[Tensor, "batch seq"]) -> None:
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        self.starts = starts
        self.run = starts.flatten().cumsum(0).view(document.shape) - 1
        self._kept: dict[tuple, Any] = {}
        if document.device.type == "cpu":
            # Here and not where they are asked for: there a compiled graph would end.
            first = starts.flatten().nonzero().flatten()
            self.bounds: Int[Tensor, " documents_and_end"] = torch.cat(
                [first, first.new_tensor([document.numel()])]
            )
            """Where documents start in the flattened batch, and where the last one ends."""
            self.longest = int(self.bounds.diff().max())
            """Tokens of the longest document."""

    @property
    def position(self) -> Int[Tensor, "batch seq"]:
        """Tokens since the start of the document."""
        place = torch.arange(self.run.numel(), device=self.run.device)
        first = place.masked_fill(~self.starts.flatten(), 0).cummax(0).values
        return (place - first).view(self.run.shape)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor, window: int | None
    ) -> Tensor:
        """`fast_attend` with this layout; where a row is split over ranks, its layout knows how."""
        return fast_attend(q, k, v, sinks=sinks, layout=self, window=window)

    def prepare(self, window: int | None, dtype: torch.dtype) -> None:
        """Make what `attend` needs, outside of blocks: those may be compiled, or computed again.

        Args:
            dtype: of the queries.
        """
        if self.run.device.type != "cpu":
            self.block_mask(window)
        elif window is not None and window < self.longest:
            self.band(window, dtype)

    def mask(self, window: int | None) -> Bool[Tensor, "batch seq seq"]:
        if ("mask", window) not in self._kept:
            self._kept["mask", window] = attention_mask(self.run, window)
        return self._kept["mask", window]

    def band(self, window: int, dtype: torch.dtype) -> Float[Tensor, "blocks 1 window keys"]:
        if ("band", window, dtype) not in self._kept:
            self._kept["band", window, dtype] = band_mask(self.run.flatten(), window, dtype)
        return self._kept["band", window, dtype]

    def block_mask(self, window: int | None) -> BlockMask:
        if ("block", window) not in self._kept:
            self._kept["block", window] = flex_mask(self.run, window)
        return self._kept["block", window]
