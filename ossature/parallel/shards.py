"""The weights of a model on one rank, before there are any: parts, shards, and FSDP's groups.

The rules are those by which training divides a model; a dry run holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ossature.config import ParallelConfig, TrainConfig
from ossature.model.transformer import Transformer
from ossature.parallel.expert import SPLITS
from ossature.parallel.sizes import Bytes, Gradients
from ossature.parallel.tensor import ROWS


@dataclass(frozen=True)
class Weight:
    """One parameter: what tp, ep and etp leave of it on the rank that has most."""

    name: str
    shape: tuple[int, ...]
    item: int
    """Bytes of a number, as it is kept."""
    used_item: int
    """Bytes of a number, as it is computed with."""
    trained: bool
    state_bytes: Bytes
    """Of the optimizer, for one number."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def shard(self, ranks: int, even: bool) -> int:
        """Numbers that FSDP keeps on a rank; short shards are filled up.

        Args:
            even: shard what is inside of experts, where their number does not divide.
        """
        if even and inside(self.shape, ranks):
            return self.size // ranks
        first, *rest = self.shape
        return -(-first // ranks) * math.prod(rest)

    def inside(self, ranks: int, even: bool) -> bool:
        return even and inside(self.shape, ranks)


def inside(shape: tuple[int, ...], ranks: int) -> bool:
    """Whether FSDP shards the second dim of some experts' parameter: their number does not divide,
    and that does."""
    first, *rest = shape
    return bool(first % ranks and rest and rest[0] % ranks == 0)


def part(name: str, shape: tuple[int, ...], axes: ParallelConfig) -> tuple[int, ...]:
    """What tp, ep and etp leave of a parameter; of uneven parts the largest."""
    *_, module, leaf = name.split(".")
    dims: dict[int, int] = {}
    if module == "experts":
        for axis, ranks in (("ep", axes.ep), ("etp", axes.etp)):
            dim = SPLITS[leaf][axis]
            if dim is not None:
                dims[dim] = dims.get(dim, 1) * ranks
    elif leaf in TENSOR_SPLITS.get(module, {}):
        dims[TENSOR_SPLITS[module][leaf]] = axes.tp
    return tuple(-(-size // dims.get(dim, 1)) for dim, size in enumerate(shape))


TENSOR_SPLITS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "sinks", "lm_head"), ROWS) | {
    "o_proj": {"weight": 1, "lora_a": 1},
    "embedding": {"weight": 0, "lora_a": 1},
}
"""The dim of each parameter that tp splits, by leaf module."""

StateBytes = Callable[[str, nn.Parameter], Bytes]
"""Bytes of the optimizer for one number of a trained parameter."""


def divided(model: Transformer, config: TrainConfig, state_bytes: StateBytes) -> list[Weight]:
    """The weights of a model on the meta device, before FSDP; of all stages."""
    item = 4 if config.precision == "fp32" else 2
    return [
        Weight(
            name,
            part(name, tuple(p.shape), config.parallel),
            p.element_size(),
            item if p.is_floating_point() else p.element_size(),
            p.requires_grad,
            state_bytes(name, p) if p.requires_grad else 0.0,
        )
        for name, p in model.named_parameters()
    ]


class Group:
    """Weights that FSDP gathers and reduces together."""

    def __init__(
        self, weights: list[Weight], ranks: int, axes: ParallelConfig, *, even: bool, root: bool
    ) -> None:
        self.ranks = ranks
        auto = "always" if axes.pp == 1 else "never"
        asked = axes.reshard_after_forward
        self.dropped = ranks > 1 and (auto if asked == "auto" else asked) == "always"
        """After the backward pass; else only at the end of the step."""
        self.again = self.dropped and not root
        """Dropped after the forward pass too, and gathered for the backward pass again."""
        # On one rank what is frozen is left alone.
        mine = [w for w in weights if w.trained or ranks > 1]
        trained = [w for w in mine if w.trained]
        kept = {w.name: w.shard(ranks, even) for w in weights}
        self.weights = sum(kept[w.name] * w.item for w in weights)
        self.states = sum(kept[w.name] * w.state_bytes for w in trained)
        self.shards = sum(kept[w.name] * w.item for w in trained)
        reduce_item = 4 if axes.reduce_dtype == "fp32" else 2
        self.reduced = sum(kept[w.name] * reduce_item for w in trained)
        self.whole = sum(kept[w.name] * ranks * w.used_item for w in mine)
        self.sent = sum(kept[w.name] * w.used_item for w in mine if w.used_item != w.item)
        self.largest_cast = max(
            (w.size * w.used_item for w in mine if w.used_item != w.item), default=0
        )
        self.inside = sum(w.size * w.used_item for w in mine if w.inside(ranks, even))
        self.largest_inside = max(
            (w.size * reduce_item for w in trained if w.inside(ranks, even)), default=0
        )
        self.gradients = sum(w.size * w.used_item for w in trained)
        self.gradients_summed = sum(w.size * reduce_item for w in trained)
        self.largest_shard = max((kept[w.name] for w in trained), default=0)
        self.is_whole = False
        self.coming = False
        """Asked for ahead of time."""
        self.summed = False
        """Gradients of earlier micro-batches are there, as they are reduced."""
        self.stepped: Bytes = 0.0
        """Of its gradients, those that have been stepped while others are to come."""
        self.has_shards = False
        """And those that are reduced already."""


class Stage:
    """Blocks of a rank in a row, with their groups; a model without a pipeline is one."""

    def __init__(
        self, weights: list[Weight], layers: range, first: bool, last: bool, config: TrainConfig,
        fsdp: int,
    ) -> None:  # fmt: skip
        axes = config.parallel
        self.layers, self.first, self.last = layers, first, last
        lent = fsdp * axes.tp
        apart = axes.tp * axes.ep * axes.etp > 1
        efsdp = lent // (axes.ep * axes.etp)

        by_module: dict[str, list[Weight]] = {}
        for w in weights:
            top, number, *_ = w.name.split(".")
            by_module.setdefault(f"{top}.{number}" if top == "blocks" else top, []).append(w)

        def named(*modules: str) -> list[Weight]:
            return [w for module in modules for w in by_module.get(module, [])]

        tops = (["embedding"] if first else []) + (["norm", "lm_head"] if last else [])
        self.root = Group(named(*tops), fsdp, axes, even=False, root=True)
        self.blocks: list[Group] = []
        self.experts: list[Group | None] = []
        self.gradients: list[Gradients] = []
        for n in layers:
            mine = named(f"blocks.{n}")
            experts = [w for w in mine if ".experts." in w.name]
            rest = [w for w in mine if ".experts." not in w.name]
            block = Group(rest if apart else mine, fsdp, axes, even=False, root=False)
            self.blocks.append(block)
            inner = Group(experts, efsdp, axes, even=True, root=False) if apart else None
            self.experts.append(inner)
            self.gradients.append(_gradients(mine))
        self.embedding_gradient = _trained_bytes(named("embedding")) if first else 0
        self.head_gradient = _trained_bytes(named("lm_head")) if last else 0
        self.norm_gradient = _trained_bytes(named("norm")) if last else 0
        self.vocab = next((w.shape[0] for w in named("lm_head") if w.name == "lm_head.weight"), 0)
        self.held_output = 0.0
        """Of the last gathering of a forward pass, until the next one's."""
        self.reducing = 0.0
        """Input of the last reduction, until the next one's."""

    @property
    def groups(self) -> list[Group]:
        """In the order in which forward is done with them."""
        found = []
        for block, experts in zip(self.blocks, self.experts, strict=True):
            found += [block] if experts is None else [experts, block]
        return [*found, self.root]


def _trained_bytes(weights: list[Weight]) -> int:
    return sum(w.size * w.used_item for w in weights if w.trained)


def _gradients(block: list[Weight]) -> Gradients:
    by: dict[str, int] = {}
    for w in block:
        if w.trained:
            *_, module, _leaf = w.name.split(".")
            by[module] = by.get(module, 0) + w.size * w.used_item
    return Gradients(
        o_proj=by.get("o_proj", 0),
        qkv=sum(by.get(f"{p}_proj", 0) for p in "qkv"),
        router=by.get("router", 0),
        experts=by.get("experts", 0),
        norms=by.get("attention_norm", 0) + by.get("moe_norm", 0) + by.get("sinks", 0),
    )
