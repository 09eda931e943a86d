"""A run -> one small enough to compute anywhere, with the same layout and the same switches.

Its dimensions are pairwise different as far as the layout permits: what is transposed, or cut along
the wrong one, then does not fit.  They divide by what the axes need, and uneven where the run's own
are.  What the small run keeps is how the run is divided; what it changes is listed by `changes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ossature.config import DataConfig, TrainConfig
from ossature.kernels.mxfp4 import GROUP
from ossature.model.config import ModelConfig
from ossature.parallel.stages import stages_per_rank
from ossature.train.prove import Case
from ossature.train.setup import micro_batches

LR, EPS, CLIP, AUX_LOSS, Z_LOSS, RANK = 1e-2, 1e-6, 0.1, 0.3, 0.1, 5


def reduce(config: TrainConfig, shape: ModelConfig, sizes: dict[str, int]) -> Case:
    """The case that stands for a run.

    Args:
        shape: of the run's model.
        sizes: ranks along every axis; what `setup.check_layout` lets pass.
    """
    small = reduced_shape(config, shape, sizes)
    seq = _row(sizes, small)
    chunks = 2 * sizes["cp"]
    if sizes["cp"] > 1 and config.data.seq_len // chunks < shape.sliding_window:
        small = replace(small, sliding_window=seq // chunks + 3)  # so that a halo spans two ranks
    stages = sizes["pp"] * stages_per_rank(config.parallel) if sizes["pp"] > 1 else 1
    count = min(micro_batches(config, sizes), 2 * stages)
    micro = min(config.micro_batch_tokens // config.data.seq_len, 2) * seq
    optim, router, lora = config.optim, config.router, config.lora
    reduced = replace(
        config,
        num_layers=0,
        precision="fp32",
        float8="",
        float8_emulate=False,
        micro_batch_tokens=micro,
        global_batch_tokens=micro * count * sizes["dp_replicate"] * sizes["dp_shard"],
        data=DataConfig(
            mock=True, seq_len=seq, separate_documents=config.data.separate_documents
        ),
        optim=replace(
            optim, lr=LR, min_lr=0.0, eps=max(optim.eps, EPS), clip=CLIP if optim.clip else 0.0,
            states="fp32", weights="fp32", in_backward=False,
        ),
        parallel=replace(config.parallel, reduce_dtype="fp32"),
        lora=replace(lora, dropout=0.0, rank=min(lora.rank, RANK), alpha=float(RANK)),
        router=replace(
            router,
            aux_loss=AUX_LOSS if router.aux_loss else 0.0,
            z_loss=Z_LOSS if router.z_loss else 0.0,
        ),
    )  # fmt: skip
    return Case(reduced, small)


def changes(config: TrainConfig) -> Iterator[str]:
    """What of a run is not compared as it is, beside the sizes of model and batch."""
    optim, router = config.optim, config.router
    if config.precision != "fp32":
        yield f"precision {config.precision}: compared in fp32"
    if config.float8:
        yield f"float8 {config.float8}: compared in fp32"
    for key, value in [
        ("optim.states", optim.states), ("optim.weights", optim.weights),
        ("parallel.reduce_dtype", config.parallel.reduce_dtype),
    ]:  # fmt: skip
        if value != "fp32":
            yield f"{key} {value}: compared in fp32"
    if config.lora.dropout:
        yield f"lora.dropout {config.lora.dropout}: compared without"
    if config.lora.rank:
        yield f"lora.rank {min(config.lora.rank, RANK)}, lora.alpha {RANK}: for a smaller model"
    if optim.in_backward:
        yield "optim.in_backward: compared with steps after backward"
    clip = f", optim.clip {CLIP}" if optim.clip else ""
    yield f"optim.lr {LR}, optim.eps {max(optim.eps, EPS)}{clip}: so that both steps show, and clip"
    for key, value, ours in [
        ("aux_loss", router.aux_loss, AUX_LOSS), ("z_loss", router.z_loss, Z_LOSS),
    ]:  # fmt: skip
        if value:
            yield f"router.{key} {ours}: so that it shows"


def reduced_shape(config: TrainConfig, shape: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    """A shape that the layout can divide as it divides the run's.

    Two blocks more than there are stages, sliding and full ones in turn.
    """
    axes, tp = config.parallel, sizes["tp"]
    efsdp = math.prod(sizes[a] for a in ("dp_shard", "cp", "tp")) // (axes.ep * axes.etp)
    stages = sizes["pp"] * stages_per_rank(axes) if sizes["pp"] > 1 else 0
    taken: set[int] = set()

    def pick(least: int, multiple: int = 1, rest: int = 0, times: tuple[int, ...] = (1,)) -> int:
        """The smallest number that is not taken yet, nor are these products of it."""
        size = -(-least // multiple) * multiple + rest
        while taken & {size * factor for factor in times}:
            size += multiple
        taken.update(size * factor for factor in times)
        return size

    key_heads = pick(2, tp)
    group = pick(3)  # query heads a key head
    heads = pick(key_heads * group, key_heads * group)
    chosen = pick(2)
    even = (shape.num_local_experts // axes.ep) % efsdp == 0
    experts = pick(max(6, chosen + 1), axes.ep * (efsdp if even else 1))
    head_dim = pick(16, 8, times=(1, heads, key_heads))
    group_of = GROUP if config.lora.base == "mxfp4" else 8
    inner = pick(24, group_of * axes.etp, times=(1, 2))
    hidden = pick(40, group_of)
    vocab = pick(96, tp, 0 if shape.vocab_size % tp == 0 else 1)
    return replace(
        shape,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=stages + 2,
        layer_types=(),
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        sliding_window=pick(7),
        initializer_range=0.1,
    )


def _row(sizes: dict[str, int], small: ModelConfig) -> int:
    """Tokens of a row: chunks that cp and tp can have, longer than the window."""
    cp, tp = sizes["cp"], sizes["tp"]
    unit = math.lcm(2 * cp if cp > 1 else 1, cp * tp)
    return -(-max(32, 2 * cp * (small.sliding_window + 1)) // unit) * unit
