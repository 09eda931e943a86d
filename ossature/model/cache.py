"""Keys and values of the tokens that rows have seen, kept while sampling.

A full layer keeps every token.  A sliding layer keeps the last `sliding_window`, in a ring: the
token at place p of its row lies in slot p % slots, so the newest overwrites the one that has just
left the window.  Everything goes by place in the row, as in training; rows of unequal prompts are
padded in front, and since a row goes on with its last document, its padding is never seen.

Cached = recomputed, past the window too: tests/sample/test_generate.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ossature.model.config import ModelConfig


class Cache:
    """What a model has seen of a batch of rows, for `model(tokens, cache=cache)`.

    The first call takes whole prompts, every later one a single token a row.

    Args:
        room: tokens a row may grow to, its prompt and padding included.
    """

    def __init__(self, config: ModelConfig, room: int) -> None:
        self.room = room
        self.layers = [
            LayerCache(room if (window := config.window(layer)) is None else min(window, room))
            for layer in range(config.num_hidden_layers)
        ]
        self.length = 0
        """Tokens of each row so far, padding included."""

    def start(self, run: Int[Tensor, "batch seq"], position: Int[Tensor, "batch seq"]) -> None:
        """Take in whole prompts.

        Args:
            run: number of the document of each token; a row goes on with its last one.
            position: RoPE positions; the next token's is one more than the last.
        """
        self._admit(run.shape[1])
        self.first = (run != run[:, -1:]).sum(dim=1)  # place of the last document's first token
        self.position = position[:, -1:]

    def step(self, tokens: Int[Tensor, "batch seq"]) -> Step:
        """Take in one more token a row."""
        if tokens.shape[1] != 1:
            raise ValueError(
                f"a cache in use takes one token a row at a time, not {tokens.shape[1]}"
            )
        self._admit(1)
        self.position = self.position + 1
        return Step(self.length, self.first, self.position)

    def _admit(self, tokens: int) -> None:
        self.length += tokens
        if self.length > self.room:
            raise ValueError(f"the cache has room for {self.room} tokens a row, not {self.length}")


class LayerCache:
    """The keys and values of one layer; a rank keeps those of its own heads."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.length = 0
        """Tokens of each row that came by; the last `slots` of them are kept."""

    def extend(
        self,
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
    ) -> tuple[
        Float[Tensor, "batch kv_seq kv_heads head_dim"],
        Float[Tensor, "batch kv_seq kv_heads head_dim"],
    ]:
        """Keep the newest tokens' keys and values; returns all that are kept, by slot."""
        if not self.length:
            self._keys, self._values = (
                x.new_empty(x.shape[0], self.slots, *x.shape[2:]) for x in (k, v)
            )
        end = self.length + k.shape[1]
        slot = torch.arange(max(self.length, end - self.slots), end, device=k.device) % self.slots
        self._keys[:, slot] = k[:, -self.slots :]
        self._values[:, slot] = v[:, -self.slots :]
        self.length = end
        kept = min(end, self.slots)
        return self._keys[:, :kept], self._values[:, :kept]


class Step:
    """Which kept keys one new token a row sees; stands where `Layout` stands for whole rows."""

    def __init__(
        self, length: int, first: Int[Tensor, " batch"], position: Int[Tensor, "batch 1"]
    ) -> None:
        self.length, self.first, self.position = length, first, position

    def mask(self, window: int | None) -> Bool[Tensor, "batch 1 kv_seq"]:
        """True for the keys of the token's own document; the ring holds no key out of the window.

        Args:
            window: tokens a query sees, its own included; None sees the whole document.
        """
        kept = self.length if window is None else min(window, self.length)
        slot = torch.arange(kept, device=self.first.device)
        last = self.length - 1
        place = last - (last - slot) % kept  # the newest place that falls on the slot
        return (place >= self.first[:, None])[:, None]


def attend_kept(
    q: Float[Tensor, "batch seq heads head_dim"],
    k: Float[Tensor, "batch kv_seq kv_heads head_dim"],
    v: Float[Tensor, "batch kv_seq kv_heads head_dim"],
    *,
    sinks: Float[Tensor, " heads"],
    mask: Bool[Tensor, "batch seq kv_seq"],
) -> Float[Tensor, "batch seq heads head_dim"]:
    """`attend` without a copy of the keys per query head; logits and softmax in fp32."""
    q = q.unflatten(2, (k.shape[2], -1))  # (batch, seq, kv_heads, group, head_dim)
    logits = torch.einsum("bqhgd,bkhd->bhgqk", q, k).float() * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    sink = sinks.float().view(q.shape[2:4])[:, :, None, None].expand(*logits.shape[:-1], 1)
    weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("bhgqk,bkhd->bqhgd", weights.to(v.dtype), v).flatten(2, 3)
