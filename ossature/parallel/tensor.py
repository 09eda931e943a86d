"""Tensor parallelism: heads and the vocabulary divided over the ranks of the axis `tp`.

A rank has some heads with their sinks, and the columns of o_proj that read them: it finds one term
of a sum over the ranks, on the whole sequence.  Between those parts the sequence is divided
(`ossature.parallel.sequence`), so that nothing is computed twice.  What is not split (norms,
router, the bias of o_proj) every rank has whole and uses on its own tokens: the gradients of those
are added up.  Experts are whole too, and theirs is added up by FSDP (`ossature.parallel.expert`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ossature.config import TrainConfig
from ossature.model.attention import Attention
from ossature.model.lora import Adapted
from ossature.model.moe import MoE
from ossature.model.transformer import Transformer
from ossature.parallel.collectives import sum_ranks
from ossature.parallel.float8 import gather_rounded
from ossature.parallel.local import Use, added_once, compute_locally, split, summed
from ossature.parallel.overlap import overlap
from ossature.parallel.sequence import Sequence
from ossature.parallel.vocabulary import split_embedding, split_head


def split_tensors(model: Transformer, view: DeviceMesh, config: TrainConfig) -> None:
    """Divide the model over tp in place; modules that a pipeline stage does not have are skipped.

    Args:
        view: of the dense weights, by `mesh.dense_view`.
        config: for `loss_parallel`, `async_tp` and `float8`.
    """
    tp = view["tp"]
    sequence = Sequence(tp.get_group())
    sequence.watch(model)
    if model.embedding is not None:
        split_embedding(model.embedding, sequence)
        _split(model.embedding, tp, {"weight": 0, "lora_a": 1}, sequence)
    if model.lm_head is not None:
        split_head(model.lm_head, sequence, config.parallel.loss_parallel)
        _split(model.lm_head, tp, ROWS, sequence)
        compute_locally(model.norm, weight=summed(sequence.group))
    for block in model.blocks.values():
        for name in ("attention_norm", "moe_norm"):
            compute_locally(block.get_submodule(name), weight=summed(sequence.group))
        attention, moe = block.get_submodule("attention"), block.get_submodule("moe")
        assert isinstance(attention, Attention) and isinstance(moe, MoE)
        _split_attention(attention, tp, sequence, config)
        _split(moe.router, tp, {}, sequence)
        moe.register_forward_pre_hook(partial(_cut_counted, sequence))


def _split_attention(
    attention: Attention, tp: DeviceMesh, sequence: Sequence, config: TrainConfig
) -> None:
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        _split(projection, tp, ROWS, sequence)
    _split(attention.sinks, tp, ROWS, sequence)
    columns = {"weight": 1, "lora_a": 1}
    _split(attention.o_proj, tp, columns, sequence, bias=added_once(sequence.group))
    if config.parallel.async_tp:
        overlap(attention, sequence)
        return
    plain = attention.forward
    rounds = config.float8 == "tensorwise"

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if rounds and sequence.divided:
            whole = gather_rounded(attention, tp, x)
        else:
            whole = sequence.whole(x)
        return sequence.part(plain(whole, *args, **kwargs))

    attention.forward = forward


ROWS = {"weight": 0, "bias": 0, "lora_b": 0, "lora_magnitude": 0}
"""The dim that is split of a leaf's parameters, where ranks find parts of its output."""


def _split(
    module: nn.Module, tp: DeviceMesh, dims: dict[str, int], sequence: Sequence, **uses: Use
) -> None:
    """Split what `dims` names of a module's parameters; all ranks have the rest.

    Each rank uses the rest on something of its own, so gradients of that are added up.

    Args:
        uses: of some of the rest, if it is another one.
    """
    whole = [name for name, _ in module.named_parameters() if name not in dims]
    there = {name: (dim,) for name, dim in dims.items() if name in dict(module.named_parameters())}
    split(module, tp, **there)
    compute_locally(module, **(dict.fromkeys(whole, summed(sequence.group)) | uses))
    if isinstance(module, Adapted) and dims.get("lora_a") is not None:
        module.add_squares = partial(sum_ranks, group=sequence.group)


def _cut_counted(sequence: Sequence, _moe: nn.Module, args: tuple[Tensor, Tensor | None]) -> Any:
    """The statistics of a rank are those of its own tokens."""
    x, counted = args
    return x, counted if counted is None else sequence.own(counted)
