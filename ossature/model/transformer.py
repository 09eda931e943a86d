"""The gpt-oss network: embedding, blocks, norm, head.  It knows no ranks and no files."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ossature.kernels.cross_entropy import LossAndGradient, linear_cross_entropy
from ossature.kernels.norm import rms_norm
from ossature.model.attention import Attention, Form, Layout
from ossature.model.cache import Prompt, Step
from ossature.model.config import ModelConfig
from ossature.model.init import initial_weight
from ossature.model.moe import MoE, RouterLog, RouterStatistics
from ossature.model.rope import Rotation, rotation


class Transformer(nn.Module):
    """gpt-oss for training and sampling.

    Args:
        attention_form, moe_form: "fast", or "eager" for the specification; both compute the same.

    Built on the meta device it holds no memory and no weights; elsewhere it is initialised with
    seed 0.
    """

    def __init__(
        self, config: ModelConfig, *, attention_form: Form = "fast", moe_form: Form = "fast"
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        # Keyed by number, so that a pipeline stage keeps the names of its blocks.
        self.blocks = nn.ModuleDict(
            {
                str(layer): Block(config, layer, attention_form, moe_form)
                for layer in range(config.num_hidden_layers)
            }
        )
        self.norm = RMSNorm(config)
        self.lm_head = Head(config)
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed=0)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        position: Int[Tensor, "batch seq"] | None = None,
        document: Int[Tensor, "batch seq"] | None = None,
        targets: Int[Tensor, "batch seq"] | None = None,
        router_log: RouterLog | None = None,
        cache: Prompt | Step | None = None,
        layout: Layout | None = None,
    ) -> Float[Tensor, "batch places vocab"] | Float[Tensor, ""]:
        """Logits; or, with targets, the sum of the cross-entropy over the counted ones, in fp32.

        Args:
            position: RoPE positions; default 0, 1, ..., restarting where `document` changes.
            document: ids of the documents of a packed row; no token sees another document.
                A negative id marks padding, which router statistics leave out.
            targets: the token to predict from each place, already shifted; -100 is not counted.
            router_log: filled with the statistics of every layer.
            cache: a turn of a `Cache`, which says what the tokens go on from and keeps theirs; only
                the last place has logits: (batch, 1, vocab).
            layout: which tokens see which; default from `document`.  With it comes `position`.
        """
        if document is None:
            document = torch.zeros_like(tokens)
        seen: Layout | Prompt | Step | None = layout
        if seen is None:
            seen, position = lay_out(document, position, cache)
        assert position is not None
        counted = None if router_log is None else document >= 0
        turn = turns(self.config, seen, position)
        x = self.embedding(tokens)
        x = through_blocks(self.blocks, x, turn, seen, counted, router_log)
        if cache is not None:
            x = x[:, -1:]
        return self.lm_head(self.norm(x), targets)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight from a generator of its own, seeded with its name."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(self.config, name, parameter.shape, seed))


def lay_out(
    document: Int[Tensor, "batch seq"],
    position: Int[Tensor, "batch seq"] | None,
    cache: Prompt | Step | None,
) -> tuple[Layout | Prompt | Step, Int[Tensor, "batch seq"]]:
    """What the tokens of a batch see, and their positions for RoPE."""
    if cache is not None:
        return cache, cache.position
    layout = Layout(document)
    return layout, layout.position if position is None else position


def turns(
    config: ModelConfig, layout: Layout | Prompt | Step, position: Int[Tensor, "batch seq"]
) -> Rotation:
    """Tables for RoPE; a turn of a cache has them."""
    return rotation(config, position) if isinstance(layout, Layout) else layout.turn


def through_blocks(
    blocks: nn.ModuleDict,
    x: Float[Tensor, "batch seq hidden"],
    turn: Rotation,
    layout: Layout | Prompt | Step,
    counted: Bool[Tensor, "batch places"] | None,
    router_log: RouterLog | None,
) -> Float[Tensor, "batch seq hidden"]:
    """Blocks by number, in order: all of a model's, or those of a pipeline stage."""
    if isinstance(layout, Layout):
        for block in blocks.values():
            attention = block.get_submodule("attention")
            assert isinstance(attention, Attention)
            attention.prepare(layout, x.dtype)
    for block in blocks.values():
        x, statistics = block(x, turn, layout, counted)
        if router_log is not None:
            router_log.layers.append(statistics)
    return x


class Block(nn.Module):
    def __init__(
        self, config: ModelConfig, layer: int, attention_form: Form, moe_form: Form
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, layer, attention_form)
        self.moe_norm = RMSNorm(config)
        self.moe = MoE(config, moe_form)

    def forward(
        self,
        x: Float[Tensor, "batch seq hidden"],
        turn: Rotation,
        layout: Layout | Prompt | Step,
        counted: Bool[Tensor, "batch seq"] | None,
    ) -> tuple[Float[Tensor, "batch seq hidden"], RouterStatistics | None]:
        x = x + self.attention(self.attention_norm(x), turn, layout)
        y, statistics = self.moe(self.moe_norm(x), counted)
        return x + y, statistics


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        return nn.functional.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm; the weight is multiplied in fp32, before the cast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        return rms_norm(x, self.weight, self.eps)


class Head(nn.Module):
    """Logits of the next token; or their cross-entropy, without ever holding all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], targets: Int[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq vocab"] | Float[Tensor, ""]:
        return self.logits(x) if targets is None else self.loss(x, targets)

    def logits(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        return nn.functional.linear(x, self.weight)

    def loss(
        self,
        x: Float[Tensor, "batch seq hidden"],
        targets: Int[Tensor, "batch seq"],
        chunk_tokens: int | None = None,
        chunk_loss: LossAndGradient | None = None,
    ) -> Float[Tensor, ""]:
        """As `linear_cross_entropy`, which explains the last two."""
        return linear_cross_entropy(
            x.flatten(0, 1), self.weight, targets.flatten(), chunk_tokens, chunk_loss
        )
