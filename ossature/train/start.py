"""The first values of a run with adapters: a frozen base, packed or not, and fresh adapters.

They depend on the checkpoint or the seed, and on names, never on the number of ranks.  A rank
reads what it has, of packed experts whole ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossature.checkpoint.box import Box, overlap, pieces, rows, within
from ossature.config import TrainConfig
from ossature.convert.adapters import Adapter, find_adapter
from ossature.convert.base import check_base, read_base
from ossature.convert.model import is_packed
from ossature.convert.names import shapes
from ossature.convert.source import Source
from ossature.convert.transfer import PIECE_BYTES
from ossature.kernels.mxfp4 import dequantize, quantize
from ossature.model.config import ModelConfig
from ossature.model.init import initial_weight
from ossature.model.lora import initial_magnitude, is_adapter
from ossature.model.transformer import Transformer
from ossature.parallel.fsdp import COMPUTE_DTYPE
from ossature.parallel.gradients import local
from ossature.parallel.weights import own_box

BLOCKS, SCALES = "_blocks", "_scales"


@torch.no_grad()
def fill_adapted(
    model: Transformer, config: TrainConfig, source: Source | None, adapter: Adapter | None = None
) -> None:
    """Set this rank's part of every parameter of a model with adapters.

    Args:
        source: of the checkpoint that the run starts from; None draws from the run's seed.
        adapter: the first values of the adapters; None draws them from the run's seed.

    Raises:
        ValueError: the run wants packed experts, and the checkpoint's are not.
    """
    start = _Start(config, model.config, source)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        part, own = local(parameter.detach()), own_box(parameter)
        if name.endswith(BLOCKS):
            scales = parameters[name.removesuffix(BLOCKS) + SCALES]
            start.fill_packed(name.removesuffix(BLOCKS) + "_weight", parameter, scales)
        elif adapter is not None and is_adapter(name):
            part.copy_(adapter.read(name)[own])
        elif name.endswith("lora_magnitude"):
            part.copy_(initial_magnitude(model.config, name, start.rows)[own])
        elif is_adapter(name):
            shape = tuple(parameter.shape)
            part.copy_(initial_weight(model.config, name, shape, config.seed, own))
        elif not name.endswith(SCALES):  # those are filled with their blocks
            for piece in pieces(own, PIECE_BYTES // 2):
                part[within(piece, own)].copy_(start.part(name, piece))


def first_adapter(config: TrainConfig, shape: ModelConfig) -> Adapter | None:
    """The adapter that a run begins with; None for fresh ones.

    Raises:
        UnknownTensor, ValueError: it is damaged, not of this model, was trained on another base, or
            has other settings than the run: each is named.
    """
    lora = config.lora
    if not lora.start:
        return None
    adapter = find_adapter(lora.start, shape)
    differ = [
        f"lora.{name} ({_said(getattr(lora, name))}) must be {_said(getattr(adapter.lora, name))}"
        for name in SAME
        if getattr(lora, name) != getattr(adapter.lora, name)
    ]
    if differ:
        raise ValueError(
            f"{adapter.folder}: lora.start is an adapter for which {', '.join(differ)}"
        )
    if (base := read_base(adapter.folder)) is not None:
        check_base(adapter.folder, base, config.init)
    return adapter


SAME = ("rank", "alpha", "rank_stabilised", "dora", "targets")
"""Settings that say what an adapter computes; dropout, and how the base is held, may change."""


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Start:
    """The base: a checkpoint in any format, or random weights."""

    def __init__(self, config: TrainConfig, shape: ModelConfig, source: Source | None) -> None:
        self.config, self.shape, self.source = config, shape, source
        self.shapes = shapes(shape)
        lora = config.lora
        may_pack = lora.base == "plain" or lora.quantize_base
        if source is not None and not may_pack and not is_packed(source):
            raise ValueError(
                f"{source.folder}: lora.base is mxfp4 and the experts in there are not; "
                "lora.quantize_base = true rounds them to it"
            )

    def part(self, name: str, box: Box) -> Tensor:
        """A box of a weight as the checkpoint has it, or as it is drawn."""
        if self.source is not None:
            return self.source.part(name, box)
        return initial_weight(self.shape, name, self.shapes[name], self.config.seed, box)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a weight, with the numbers that the model computes with."""
        if self.config.lora.base == "mxfp4" and ".experts." in name:
            return dequantize(*self.packed(name, start, stop))
        return self.part(name, rows(self.shapes[name], start, stop)).to(
            COMPUTE_DTYPE[self.config.precision]
        )

    def packed(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Blocks and scales of some experts, as they are stored, or rounded to them."""
        pair = None if self.source is None else self.source.packed(name, start, stop)
        if pair is not None:
            return pair
        return quantize(self.part(name, rows(self.shapes[name], start, stop)))

    def fill_packed(self, name: str, blocks: Tensor, scales: Tensor) -> None:
        """Set this rank's parts of both, expert by expert; they are stored as 16-bit numbers."""
        mine = [(local(p.detach()), own_box(p)) for p in (blocks, scales)]
        starts = [own[0].start for _, own in mine]
        stops = [own[0].stop for _, own in mine]
        for expert in range(min(starts), max(stops)):
            found = self.packed(name, expert, expert + 1)
            for (part, own), whole in zip(mine, (found[0], found[1].mT), strict=True):
                box = overlap(own, (slice(expert, expert + 1), *own[1:]))
                if box is not None:
                    # A copy with strides of its own: one group would keep those of the transpose.
                    numbers = whole.clone(memory_format=torch.contiguous_format).view(part.dtype)
                    part[within(box, own)].copy_(numbers[:, *own[1:]])
