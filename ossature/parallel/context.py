"""Context parallelism: the tokens of every row divided over the ranks of the axis `cp`.

From outside: a hook cuts what goes into the model to this rank's tokens, and hands it a layout
that knows the whole row.  Everything but attention works on single tokens and notices nothing.
Attention asks the layout, which fetches keys and values first: of the whole row in full layers, of
a halo in sliding ones.  What sees what goes by place and document of the whole row; the sink is
applied once, by the rank that has the query.  The loss and the gradients of a rank are those of
its own tokens: they add up over the ranks.

Memory is O(seq / ranks), but for the keys and values of full layers, O(seq) each (268 MB in bf16
for 131,072 tokens of gpt-oss): kept for the backward pass, or gathered again where a block is
computed again.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask

from ossature.kernels.attention import band_mask, window_attention
from ossature.kernels.chunk_attention import chunk_attention
from ossature.kernels.flex import flex_attend, split_flex_mask
from ossature.model.attention import Layout
from ossature.parallel.collectives import Group
from ossature.parallel.exchange import Split, exchange, gather_row, halo


def split_sequences(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make `model(tokens, ...)` take whole rows and compute this rank's tokens of them."""
    context = Context(mesh)
    model.register_forward_pre_hook(context.cut_inputs, with_kwargs=True)


class Context:
    """The ranks that share a row, and this rank's place among them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.ranks = mesh["cp"].size()
        self.rank = mesh.get_local_rank("cp")
        self.group = mesh.get_group("cp")

    def cut_inputs(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Arguments of `Transformer.forward` for whole rows -> for this rank's tokens.

        Rows that are sampled (with a cache) are not divided: every rank computes all of them.
        """
        if kwargs.get("cache") is not None:
            return args, kwargs
        (tokens,) = args
        document = kwargs.get("document")
        document = torch.zeros_like(tokens) if document is None else document
        layout = self.layout(document)
        cut = {"position": layout.position, "document": document}
        cut |= {
            name: kwargs[name] for name in ("position", "targets") if kwargs.get(name) is not None
        }
        cut = {name: layout.split.cut(value) for name, value in cut.items()}
        return (layout.split.cut(tokens),), {**kwargs, **cut, "layout": layout}

    def layout(self, document: Tensor) -> SplitLayout:
        """The layout of whole rows, (batch, seq), for this rank's tokens."""
        return SplitLayout(document, self.split(document.shape[1]), self.group)

    def split(self, seq: int) -> Split:
        return Split(self.rank, self.ranks, seq)


class SplitLayout(Layout):
    """Which tokens of a batch may see which, for a rank that has only a part of every row."""

    def __init__(self, document: Tensor, split: Split, group: Group) -> None:
        super().__init__(document)
        self.split, self.group = split, group

    # torch.compile leaves it alone: it communicates, and the index tables are made on the host.
    @torch.compiler.disable
    def attend(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor, window: int | None
    ) -> Tensor:
        """Attention of this rank's queries to all keys they may see, wherever those are.

        Args:
            q, k, v: (batch, 2 * length, heads or kv_heads, head_dim), this rank's tokens.
        """
        kv = torch.cat([k, v], dim=-1)
        if window is None or window >= self.split.seq:
            kv = gather_row(kv, self.split, self.group)
        else:
            kv = exchange(kv, halo(self.split, window - 1), self.group)
        k, v = kv.chunk(2, dim=-1)
        if q.device.type != "cpu":
            return flex_attend(q, k, v, sinks=sinks, block_mask=self.block_mask(window))
        if window is None or window >= self.split.seq:
            rows = q.shape[:2]
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            return chunk_attention(q, k, v, sinks, self.pieces).unflatten(0, rows)
        # Halo and chunk as one sequence, with zeros for the halo's queries: nobody reads what they
        # find, so no gradient comes from them.
        chunks = q.unflatten(1, (2, -1))  # (batch, 2, length, heads, head_dim)
        zeros = q.new_zeros(*chunks.shape[:2], window - 1, *chunks.shape[3:])
        filled = torch.cat([zeros, chunks], dim=2)
        q, k, v = (x.flatten(0, 1) for x in (filled.flatten(1, 2), k, v))
        out = window_attention(q, k, v, sinks, self.band(window, q.dtype))
        return out.view(filled.shape)[:, :, window - 1 :].flatten(1, 2)

    def prepare(self, window: int | None, dtype: torch.dtype) -> None:
        if self.run.device.type != "cpu":
            self.block_mask(window)
        elif window is None or window >= self.split.seq:
            self._kept["pieces",] = self.pieces
        else:
            self.band(window, dtype)

    @property
    def pieces(self) -> Tensor:
        """`pieces` of `chunk_attention` for this rank's queries and the keys of whole rows."""
        if ("pieces",) not in self._kept:
            self._kept["pieces",] = self._cut_pieces()
        return self._kept["pieces",]

    def _cut_pieces(self) -> Tensor:
        seq, length = self.split.seq, self.split.length
        pieces = []
        for row, slot in itertools.product(range(self.run.shape[0]), range(2)):
            first = row * seq + self.split.chunks[slot] * length
            mine = (2 * row + slot) * length  # of the chunk's first query, among this rank's
            inside = self.bounds[(self.bounds > first) & (self.bounds < first + length)]
            edges = [first, *inside.tolist(), first + length]
            begins = self.bounds[
                torch.searchsorted(self.bounds, torch.tensor(edges), right=True) - 1
            ]
            for (start, end), begin in zip(
                itertools.pairwise(edges), begins.tolist(), strict=False
            ):
                pieces.append((mine + start - first, mine + end - first, begin, end))
        return torch.tensor(pieces)

    def _halo_run(self, window: int) -> Tensor:
        """Numbers of the documents of halo and chunk, (batch, 2 * (window - 1 + length)).

        The two chunks never see each other, so that a token in the halo of one that is also in
        the other counts once.
        """
        places = halo(self.split, window - 1).places
        run = self.run[:, places.clamp(min=0).to(self.run.device)] * 2
        slot = torch.arange(len(places)) * 2 // len(places)
        return (run + slot.to(run.device)).masked_fill((places < 0).to(run.device), -1)

    def band(self, window: int, dtype: torch.dtype) -> Tensor:
        if ("band", window, dtype) not in self._kept:
            run = self._halo_run(window).flatten()
            self._kept["band", window, dtype] = band_mask(run, window, dtype)
        return self._kept["band", window, dtype]

    def block_mask(self, window: int | None) -> BlockMask:
        if ("block", window) not in self._kept:
            self._kept["block", window] = self._make_block_mask(window)
        return self._kept["block", window]

    def _make_block_mask(self, window: int | None) -> BlockMask:
        device, split = self.run.device, self.split
        queries = split.places.to(device)
        if window is None or window >= split.seq:
            keys, key_run = torch.arange(split.seq, device=device), self.run
            return split_flex_mask(self.run[:, queries], queries, key_run, keys, None)
        keys, key_run = halo(split, window - 1).places.to(device), self._halo_run(window)
        own = key_run.unflatten(1, (2, -1))[:, :, window - 1 :].flatten(1)
        return split_flex_mask(own, queries, key_run, keys, window)
