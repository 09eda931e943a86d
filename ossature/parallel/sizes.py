"""Bytes that come and go in a step, and the sizes of one micro-batch on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from ossature.config import TrainConfig
from ossature.model.config import ModelConfig

Bytes = int | float
"""A count of bytes; shares of experts and of halos make fractions."""

KEPT, BRIEF, LOSS = "activations", "temporary", "loss"
GRADIENTS = "gradients, whole"
"""Of the weights as they are gathered, before they are reduced."""


class Ledger:
    """Bytes held, by what they are for; and how they were when there were most of them."""

    def __init__(self) -> None:
        self.held: dict[str, Bytes] = {}
        self.total = 0.0
        self.peak = 0.0
        self.at_peak: dict[str, Bytes] = {}

    def take(self, what: str, size: Bytes) -> None:
        self.held[what] = self.held.get(what, 0.0) + size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def give(self, what: str, size: Bytes) -> None:
        self.held[what] = self.held.get(what, 0.0) - size
        self.total -= size

    def pass_by(self, what: str, *sizes: Bytes) -> None:
        """Taken together and given back at once."""
        self.take(what, sum(sizes))
        self.give(what, sum(sizes))

    def move(self, what: str, to: str, size: Bytes) -> None:
        self.held[what] -= size
        self.held[to] = self.held.get(to, 0.0) + size


@dataclass(frozen=True)
class Sizes:
    """Numbers of one micro-batch on one rank, and of its part of the model."""

    config: TrainConfig
    shape: ModelConfig
    device: str
    """"cpu" or "cuda": whose kernels."""
    sums: bool = True
    """Whether the routers' statistics are taken, as on every step that is logged."""

    @property
    def item(self) -> int:
        """Bytes of a number in the precision of the computation."""
        return 4 if self.config.precision == "fp32" else 2

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def rows(self) -> int:
        return self.config.micro_batch_tokens // self.config.data.seq_len

    @property
    def attended(self) -> int:
        """Tokens whose queries a rank has: attention sees the whole of what tp divides."""
        return self.config.micro_batch_tokens // self.config.parallel.cp

    @property
    def tokens(self) -> int:
        """Tokens that a rank has between blocks."""
        return self.attended // self.config.parallel.tp

    @property
    def routed(self) -> int:
        """Rows of a rank's experts."""
        return self.tokens * self.config.parallel.etp * self.shape.num_experts_per_tok

    @property
    def x(self) -> Bytes:
        """What goes from block to block."""
        return self.tokens * self.shape.hidden_size * self.item

    @property
    def whole_x(self) -> Bytes:
        """The same where tp does not divide it."""
        return self.x * self.config.parallel.tp

    @property
    def taken_x(self) -> Bytes:
        """The same as attention takes it: rounded before it is gathered, under float8 and tp."""
        rounded = self.config.float8 == "tensorwise" and self.config.parallel.tp > 1
        return self.whole_x / (self.item if rounded else 1)

    @property
    def heads(self) -> int:
        return self.shape.num_attention_heads // self.config.parallel.tp

    @property
    def q(self) -> Bytes:
        return self.attended * self.heads * self.shape.head_dim * self.item

    @property
    def k(self) -> Bytes:
        kv_heads = self.shape.num_key_value_heads // self.config.parallel.tp
        return self.attended * kv_heads * self.shape.head_dim * self.item

    @property
    def lse(self) -> Bytes:
        return self.attended * self.heads * 4

    @property
    def row(self) -> Bytes:
        """One row for each choice, `hidden` wide."""
        return self.routed * self.shape.hidden_size * self.item

    @property
    def inner(self) -> Bytes:
        """One row for each choice, as wide as a rank's part of an expert."""
        return self.routed * self.shape.intermediate_size // self.config.parallel.etp * self.item

    @property
    def widened(self) -> Bytes:
        """fp32 numbers of a norm that exist at a time."""
        numbers = self.tokens * self.shape.hidden_size
        return 4 * (numbers if self.cuda else min(numbers, 2**17))

    def low(self, *targets: str) -> Bytes:
        """Bytes of a token's inputs, as the adapters of these matrices narrow them."""
        lora = self.config.lora
        return lora.rank * self.item * sum(target in lora.targets for target in targets)

    def learns(self, *targets: str) -> bool:
        """Whether there are gradients of these matrices or of their adapters."""
        lora = self.config.lora
        return not lora.rank or any(target in lora.targets for target in targets)

    @property
    def adapted_experts(self) -> bool:
        """Whether experts are computed by the kernels for frozen matrices."""
        lora = self.config.lora
        return lora.rank > 0 and (lora.base == "mxfp4" or self.learns("gate_up", "down"))

    def slides(self, layer: int) -> bool:
        """Whether a layer is computed as one with a window."""
        window = self.shape.window(layer)
        return window is not None and window < self.config.data.seq_len


@dataclass(frozen=True)
class Gradients:
    """Bytes of the gradients of a block's weights, in the precision of the computation."""

    o_proj: Bytes
    qkv: Bytes
    router: Bytes
    experts: Bytes
    norms: Bytes
