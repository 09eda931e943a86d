"""LoRA and DoRA: a frozen model, and a trainable product of low rank beside its matrices.

    W' = W + scale * B @ A        LoRA; A is (rank, in), B is (out, rank)
    W' = m * V / |V|, V = W + scale * B @ A        DoRA; m and the norms |V| by rows

The norm counts as a constant in the backward pass.  Experts have an adapter each.  W' is never
made: what is computed is (x A) B beside x W.  `merged` makes it, in fp64: it is the specification
that tests hold the layers against, and what a merge needs.

An adapter's parameters are parameters of the leaf they belong to:

    blocks.N.attention.q_proj.lora_a (rank, in)  .lora_b (out, rank)  .lora_magnitude (out)
    blocks.N.moe.router.lora_a ...               lm_head.lora_a ...
    blocks.N.moe.experts.gate_up_lora_a (experts, rank, hidden)
                        .gate_up_lora_b (experts, 2 inner, rank), rows alternate gate, up
                        .gate_up_lora_magnitude (experts, 2 inner);  .down_lora_a ...
    embedding.lora_a (rank, vocab)  .lora_b (hidden, rank)  .lora_magnitude (hidden)

The embedding counts as a matrix (hidden, vocab) times a unit vector.

Source: arXiv 2106.09685, 2312.03732, 2402.09353 (section 4.3 for the constant norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ossature.config import LoraConfig
from ossature.kernels.cross_entropy import LossAndGradient, linear_cross_entropy
from ossature.kernels.frozen_experts import row_squares
from ossature.model.config import ModelConfig
from ossature.model.frozen_experts import FrozenExperts, not_zero
from ossature.model.frozen_experts import merged as merged
from ossature.model.init import initial_weight
from ossature.model.moe import Experts, Router
from ossature.model.transformer import Embedding, Head, Transformer

EXPERT_TARGETS = ("gate_up", "down")


def adapt(model: Transformer, config: LoraConfig, dtype: torch.dtype | None = None) -> None:
    """Freeze the model and put adapters beside the leaves that `config.targets` names, in place.

    New parameters are fp32.  On the meta device they have no values, nor has what is packed;
    elsewhere call `init_adapters`.

    Args:
        dtype: that the frozen weights are held in; default: the one they have.

    Raises:
        ValueError: a target matches nothing; or a matrix to be packed is no multiple of 32 wide.
    """
    found: set[str] = set()
    for name, module in list(model.named_modules()):
        freeze(module, dtype)
        leaf = name.rpartition(".")[2]
        if isinstance(module, Experts):
            targets = [target for target in EXPERT_TARGETS if target in config.targets]
            if targets or config.base == "mxfp4" or isinstance(module, FrozenExperts):
                FrozenExperts.adopt(module, config, targets)
            found |= set(targets)
        elif leaf in config.targets:
            KINDS[leaf].adopt(module, config)
            found.add(leaf)
    for target in config.targets:
        if target not in found:
            raise ValueError(f"lora.targets: {target} matches nothing in this model")


def pack(model: Transformer) -> None:
    """Hold the experts' matrices in MXFP4, in place; the model is then to be used, not trained.

    Raises:
        ValueError: a matrix is no multiple of 32 wide.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            FrozenExperts.adopt(module, LoraConfig(base="mxfp4"), ())


def freeze(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Let the module's own parameters be constants, held in `dtype`."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        frozen = parameter.detach()
        if dtype is not None and frozen.is_floating_point():
            frozen = frozen.to(dtype)
        module.register_parameter(name, nn.Parameter(frozen, requires_grad=False))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return "lora_" in name.rpartition(".")[2]


def base_name(name: str) -> str:
    """The weight that an adapter's parameter belongs to: `q_proj.lora_a` -> `q_proj.weight`."""
    assert is_adapter(name), name
    return name[: name.rindex("lora_")] + "weight"


def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """What a plain model would need to compute the same, by its names; adapted ones in fp64."""
    weights: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        prefix = f"{prefix}." if prefix else ""
        if isinstance(module, FrozenExperts):
            own = {f"{target}_weight": module.merged(target) for target in EXPERT_TARGETS}
            own |= {"gate_up_bias": module.gate_up_bias, "down_bias": module.down_bias}
        else:
            own = {n: p for n, p in module.named_parameters(recurse=False) if not is_adapter(n)}
            if isinstance(module, Adapted):
                own["weight"] = module.merged()
        weights |= {prefix + name: value for name, value in own.items()}
    return weights


class Adapted(nn.Module):
    """A leaf with a weight and an adapter."""

    lora: LoraConfig
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter | None
    add_squares: Callable[[Tensor], Tensor] | None
    """Adds up the squares of rows of which other ranks have other parts."""

    @classmethod
    def adopt(cls, leaf: nn.Module, config: LoraConfig) -> None:
        """Make a leaf into this, with an adapter, in place: its parameters keep their names."""
        leaf.__class__ = cls  # FSDP does the same  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(leaf, cls)
        leaf._add_adapter(config)

    def _add_adapter(self, config: LoraConfig) -> None:
        self.lora, self.add_squares = config, None
        out, size = self.matrix().shape
        wide, device = torch.promote_types(self.matrix().dtype, torch.float32), self.matrix().device
        self.lora_a = nn.Parameter(torch.empty(config.rank, size, dtype=wide, device=device))
        self.lora_b = nn.Parameter(torch.empty(out, config.rank, dtype=wide, device=device))
        magnitude = torch.empty(out, dtype=wide, device=device) if config.dora else None
        self.lora_magnitude = None if magnitude is None else nn.Parameter(magnitude)

    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        raise NotImplementedError

    def merged(self) -> Tensor:
        return merged(self.matrix(), self.lora_a, self.lora_b, self.lora_magnitude, self.lora.scale)

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.lora.dropout, self.training) if self.lora.dropout else x

    def gain(self, dtype: torch.dtype) -> Tensor | None:
        """m / |V|, (out,); None without DoRA."""
        if self.lora_magnitude is None:
            return None
        squares = self.squares()
        if self.add_squares is not None:
            squares = self.add_squares(squares)
        return (self.lora_magnitude / not_zero(squares.sqrt())).to(dtype)

    def squares(self) -> Tensor:
        """Of every row of V, summed; a slice of the columns at a time."""
        matrix, scale = self.matrix(), self.lora.scale
        total = 0
        for weight, a in zip(matrix.split(8192, 1), self.lora_a.split(8192, 1), strict=True):
            pair = weight[None], a[None], self.lora_b[None]
            total = total + row_squares(pair[0], None, pair[1], pair[2], scale, None)[0]
        assert isinstance(total, Tensor)
        return total

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W'.T + bias, in the dtype of x."""
        dtype = x.dtype
        low = F.linear(self.dropped(x), self.lora_a.to(dtype))
        bias = None if bias is None else bias.to(dtype)
        gain = self.gain(dtype)
        y = F.linear(x, self.matrix().to(dtype), bias if gain is None else None).flatten(0, -2)
        y = torch.addmm(y, low.flatten(0, -2), self.lora_b.to(dtype).mT, alpha=self.lora.scale)
        if gain is not None:
            y = y * gain if bias is None else torch.addcmul(bias, y, gain)
        return y.unflatten(0, x.shape[:-1])


class LoraLinear(Adapted, nn.Linear):
    def matrix(self) -> Tensor:
        return self.weight

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.linear(input, self.bias)


class LoraRouter(Adapted, Router):
    def matrix(self) -> Tensor:
        return self.weight

    def score(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
        return self.linear(x, self.bias)


class LoraEmbedding(Adapted, Embedding):
    """Nothing is dropped here: the input is a single one."""

    def matrix(self) -> Tensor:
        return self.weight.mT

    def merged(self) -> Tensor:
        return super().merged().mT

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        dtype = self.weight.dtype
        x, low = F.embedding(tokens, self.weight), F.embedding(tokens, self.lora_a.mT).to(dtype)
        x = x + self.lora.scale * F.linear(low, self.lora_b.to(dtype))
        gain = self.gain(dtype)
        return x if gain is None else x * gain


class LoraHead(Adapted, Head):
    def matrix(self) -> Tensor:
        return self.weight

    def logits(self, x: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        return self.linear(x, None)

    def loss(
        self,
        x: Float[Tensor, "batch seq hidden"],
        targets: Int[Tensor, "batch seq"],
        chunk_tokens: int | None = None,
        chunk_loss: LossAndGradient | None = None,
    ) -> Float[Tensor, ""]:
        x = x.flatten(0, 1)
        low = self.lora.scale * F.linear(self.dropped(x), self.lora_a.to(x.dtype))
        b, gain = self.lora_b.to(x.dtype), self.gain(x.dtype)
        return linear_cross_entropy(
            x, self.weight, targets.flatten(), chunk_tokens, chunk_loss, low, b, gain
        )


KINDS: dict[str, type[Adapted]] = {
    "q_proj": LoraLinear, "k_proj": LoraLinear, "v_proj": LoraLinear, "o_proj": LoraLinear,
    "router": LoraRouter, "embedding": LoraEmbedding, "lm_head": LoraHead,
}  # fmt: skip


@torch.no_grad()
def init_adapters(model: Transformer, seed: int) -> None:
    """Draw the adapters of a model whose weights are there: it computes what it did before."""
    for prefix, module in model.named_modules():
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            if is_adapter(name) and not name.endswith("magnitude"):
                parameter.copy_(initial_weight(model.config, prefix + name, parameter.shape, seed))
        if isinstance(module, FrozenExperts):
            module.init_magnitudes()
        elif isinstance(module, Adapted) and module.lora_magnitude is not None:
            module.lora_magnitude.copy_(torch.linalg.vector_norm(module.matrix().double(), dim=-1))


def initial_magnitude(
    config: ModelConfig, name: str, read: Callable[[str, int, int], Tensor]
) -> Tensor:
    """The lengths of the rows of a base weight, in fp32: so that an adapter changes nothing yet.

    Args:
        read: (name, start, stop) -> rows of the first dim of a base weight, as the model holds it.
    """
    base, rows = base_name(name), 0
    if base == "embedding.weight":  # (vocab, hidden), and the rows of its transpose
        squares = torch.zeros(config.hidden_size, dtype=torch.float64)
        for start in range(0, config.vocab_size, 4096):
            part = read(base, start, min(start + 4096, config.vocab_size))
            squares += part.double().square().sum(0)
        return squares.sqrt().float()
    if "experts" in base:
        rows, step = config.num_local_experts, 1
    else:
        rows, step = base_rows(config, base), 4096
    parts = [read(base, start, min(start + step, rows)) for start in range(0, rows, step)]
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=-1).float() for part in parts])


def base_rows(config: ModelConfig, base: str) -> int:
    """Rows of a weight that is a matrix."""
    leaf = base.split(".")[-2]
    return {
        "q_proj": config.num_attention_heads * config.head_dim,
        "k_proj": config.num_key_value_heads * config.head_dim,
        "v_proj": config.num_key_value_heads * config.head_dim,
        "o_proj": config.hidden_size,
        "router": config.num_local_experts,
        "lm_head": config.vocab_size,
    }[leaf]


def table(model: Transformer) -> Iterator[str]:
    """What is trained and what is frozen: leaves, parameters, share of all; a line each."""
    rows: dict[tuple[bool, str], int] = {}
    for name, parameter in model.named_parameters():
        leaf = name.split(".", 2)[-1] if name.startswith("blocks.") else name
        if is_adapter(name):
            leaf = leaf[: leaf.rindex("lora_")].rstrip("._") + " adapter"
        packed = parameter.dtype == torch.uint8
        count = 0 if packed and leaf.endswith("scales") else parameter.numel() * (1 + packed)
        leaf = leaf.replace("_blocks", "_weight, MXFP4") if packed else leaf
        if count:
            key = parameter.requires_grad, leaf
            rows[key] = rows.get(key, 0) + count
    total = sum(rows.values())
    for trained in (True, False):
        part = {leaf: count for (kind, leaf), count in rows.items() if kind is trained}
        count = sum(part.values())
        yield f"{'trained' if trained else 'frozen'}: {count:,} parameters, {count / total:.3%}"
        for leaf, number in part.items():
            yield f"  {leaf:<36} {number:>18,}"
