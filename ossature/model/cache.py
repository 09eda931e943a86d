"""Keys and values of sequences that are being sampled, and what their next tokens see of them.

A full layer has one store for all sequences.  Each has a stretch of it, as long as it may become:
what is kept is bounded, and known before a sequence is let in.  A sliding layer has a ring for
each sequence: the token at place p lies in slot p % window, so that the newest overwrites the one
that has just left the window.

A forward pass goes over one sequence's next tokens (`Prompt`) or one token of each of several
(`Step`); both stand where `Layout` stands for whole rows.  A query's result depends on its own
sequence alone, to the bit: nothing is filled up to the length of another one.

Cached = recomputed, past the window too: tests/model/test_cache.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ossature.kernels.kept_attention import attend_next, attend_ring, attend_stretches
from ossature.model.config import ModelConfig
from ossature.model.rope import inverse_frequencies, rotation


class Cache:
    """What a model has seen of some sequences, each of which has a row.

    It takes memory when a layer first has keys: a rank keeps those of its own heads, in their
    dtype.

    Args:
        rows: sequences at a time.
        tokens: of all sequences together, as many as they may grow to.
    """

    def __init__(self, config: ModelConfig, rows: int, tokens: int) -> None:
        self.config, self.tokens = config, tokens
        self.length = [0] * rows
        """Tokens of each row that are kept."""
        self.stretch: list[range] = [range(0)] * rows
        """The places of each row in the stores; empty for a row that is free."""
        self.frequencies = inverse_frequencies(config)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def free_tokens(self) -> int:
        return self.tokens - sum(map(len, self.stretch))

    @property
    def free_rows(self) -> int:
        return sum(not stretch for stretch in self.stretch)

    def admit(self, room: int) -> int:
        """A row for a new sequence, which may grow to `room` tokens."""
        assert self.free_rows and 0 < room <= self.free_tokens, "ask free_rows and free_tokens"
        row = next(row for row, stretch in enumerate(self.stretch) if not stretch)
        start = self._gap(room)
        if start is None:
            self._close_gaps()
            start = self._gap(room)
        assert start is not None
        self.stretch[row], self.length[row] = range(start, start + room), 0
        for layer, kept in self._layers.items():
            if self.config.window(layer) is not None:
                for x in kept:
                    x[row] = 0  # see `layer`; the last sequence may have left what is no number
        return row

    def leave(self, row: int) -> None:
        """The row's sequence has ended."""
        self.stretch[row], self.length[row] = range(0), 0

    def copy(self, row: int, to: int) -> None:
        """Let another row have seen the same."""
        length = self.length[to] = self.length[row]
        assert length <= len(self.stretch[to])
        for layer, kept in self._layers.items():
            for x in kept:
                if self.config.window(layer) is None:
                    source, goal = self.stretch[row].start, self.stretch[to].start
                    x[goal : goal + length] = x[source : source + length]
                else:
                    x[to] = x[row]

    def prompt(self, row: int, tokens: int, device: torch.device | str = "cpu") -> Prompt:
        """For a pass over the next `tokens` of a row's sequence."""
        self._grow(row, tokens)
        return Prompt(self, row, tokens, torch.device(device))

    def step(self, rows: Sequence[int], fill: int = 0, device: torch.device | str = "cpu") -> Step:
        """For a pass over one token of each of these rows.

        Args:
            fill: tokens that follow in the batch, copies of the first row's, and are not kept.
        """
        for row in rows:
            self._grow(row, 1)
        return Step(self, list(rows), fill, torch.device(device))

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: (tokens, kv_heads, head_dim), or (rows, window, ...)."""
        if layer not in self._layers:
            window = self.config.window(layer)
            size = (self.tokens,) if window is None else (len(self.length), window)
            # Zeros in a ring: slots that are not in use are multiplied by zero, not left out.
            new = like.new_empty if window is None else like.new_zeros
            self._layers[layer] = (
                new((*size, *like.shape[-2:])),
                new((*size, *like.shape[-2:])),
            )
        return self._layers[layer]

    def _grow(self, row: int, tokens: int) -> None:
        length = self.length[row] + tokens
        if length > len(self.stretch[row]):
            raise ValueError(
                f"the cache has room for {len(self.stretch[row])} tokens in row {row}, not {length}"
            )
        self.length[row] = length

    def _taken(self) -> list[tuple[int, int]]:
        """Starts of the stretches in use and their rows, in order."""
        return sorted((stretch.start, row) for row, stretch in enumerate(self.stretch) if stretch)

    def _gap(self, room: int) -> int | None:
        """The first place that is followed by so many free ones."""
        end = 0
        for start, row in self._taken():
            if start - end >= room:
                return end
            end = self.stretch[row].stop
        return end if self.tokens - end >= room else None

    def _close_gaps(self) -> None:
        end = 0
        for start, row in self._taken():
            size, length = len(self.stretch[row]), self.length[row]
            if start != end:
                self.stretch[row] = range(end, end + size)
                for x in self._stores():
                    x[end : end + length] = x[start : start + length].clone()
            end += size

    def _stores(self) -> Iterator[Tensor]:
        for layer, kept in self._layers.items():
            if self.config.window(layer) is None:
                yield from kept


class Prompt:
    """The next tokens of one sequence: the place of the first is `first`."""

    def __init__(self, cache: Cache, row: int, tokens: int, device: torch.device) -> None:
        self.cache, self.row = cache, row
        self.first = cache.length[row] - tokens
        self.start = cache.stretch[row].start
        place = torch.arange(self.first, self.first + tokens, device=device)
        self.position: Int[Tensor, "batch seq"] = place[None]
        self.turn = rotation(cache.config, self.position, cache.frequencies)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Float[Tensor, " heads"]
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Attention of the new tokens to themselves and to those before, which are kept."""
        window, tokens = self.cache.config.window(layer), q.shape[1]
        kept = self.cache.layer(layer, k)
        if window is None:
            before, end = self.first, self.start + self.first + tokens
            for x, new in zip(kept, (k, v), strict=True):
                x[end - tokens : end] = new[0]
            keys, values = (x[self.start : end] for x in kept)
        else:
            before = min(self.first, window - 1)
            place = torch.arange(self.first - before, self.first, device=q.device)
            keys, values = (
                torch.cat([x[self.row, place % window], new[0]])
                for x, new in zip(kept, (k, v), strict=True)
            )
            newest = torch.arange(max(0, tokens - window), tokens, device=q.device)
            for x, new in zip(kept, (k, v), strict=True):
                x[self.row, (self.first + newest) % window] = new[0, newest]
        return attend_next(q[0], keys, values, sinks, before, window)[None]


class Step:
    """One more token of each of some sequences."""

    def __init__(self, cache: Cache, rows: list[int], fill: int, device: torch.device) -> None:
        self.cache, self.rows, self.fill = cache, rows, fill
        self.lengths = [cache.length[row] for row in rows]
        self.starts = [cache.stretch[row].start for row in rows]
        self.row = torch.tensor(rows, device=device)
        self.place = torch.tensor(self.lengths, device=device) - 1
        filled = torch.cat([self.place, self.place[:1].expand(fill)])
        self.position: Int[Tensor, "batch seq"] = filled[:, None]
        self.turn = rotation(cache.config, self.position, cache.frequencies)
        self.store_place = torch.tensor(self.starts, device=device) + self.place
        self.dense = rows == list(range(len(rows)))
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Float[Tensor, " heads"]
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Attention of every new token to itself and to those before it, which are kept."""
        window, rows = self.cache.config.window(layer), len(self.rows)
        kept = self.cache.layer(layer, k)
        query = q[:rows, 0]
        if window is None:
            for x, new in zip(kept, (k, v), strict=True):
                x[self.store_place] = new[:rows, 0]
            out = attend_stretches(query, *kept, sinks, self.starts, self.lengths)
        else:
            slot, used = self._ring(window)
            for x, new in zip(kept, (k, v), strict=True):
                x[self.row, slot] = new[:rows, 0]
            keys, values = (x[:rows] if self.dense else x[self.row] for x in kept)
            out = attend_ring(query, keys, values, sinks, used)
        if self.fill:
            out = torch.cat([out, out[:1].expand(self.fill, -1, -1)])
        return out[:, None]

    def _ring(self, window: int) -> tuple[Tensor, Tensor]:
        """The slot of each new token, and which slots hold a token: (rows, window)."""
        if window not in self._slots:
            used = torch.arange(window, device=self.place.device) <= self.place[:, None]
            self._slots[window] = self.place % window, used
        return self._slots[window]


def cache_bytes(config: ModelConfig, max_batch: int, max_tokens: int, dtype_bytes: int) -> int:
    """Of keys and values, in all layers; a rank of tp or pp has its part of it."""
    places = sum(
        max_tokens if (window := config.window(layer)) is None else max_batch * window
        for layer in range(config.num_hidden_layers)
    )
    return 2 * places * config.num_key_value_heads * config.head_dim * dtype_bytes
