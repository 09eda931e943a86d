"""One table of the names, shapes and layouts of every weight, read in all directions.

Four formats: native (this project's), Hugging Face in bfloat16, Hugging Face in MXFP4 and
OpenAI's `original/`.  They differ in three ways besides names:

- an expert's matrix is (experts, out, in), but (experts, in, out) in Hugging Face's bfloat16;
- MXFP4 stores it as two tensors of bytes, blocks and scales, in both packed formats;
- OpenAI stores q, k and v as one tensor, rows of q first.

A name without a row raises UnknownTensor: no weight is ever skipped.

Source: openai/gpt-oss-20b; gpt_oss/torch/weights.py of openai/gpt-oss@7b58334;
models/gpt_oss/modeling_gpt_oss.py of transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ossature.model.config import ModelConfig


class UnknownTensor(KeyError):
    """A tensor whose name has no row in the table; str() is a plain sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


class Row(NamedTuple):
    """One kind of weight.  {n} is the number of the layer, from 0."""

    native: str
    hugging_face: str
    original: str
    shape: tuple[str, ...]
    """Native, in words of `dims`."""
    expert_matrix: bool = False
    """(in, out) in Hugging Face's bfloat16, and packed in MXFP4."""
    fused: int = -1
    """In `original`, which part of the fused tensor: 0 q, 1 k, 2 v; -1 is a tensor of its own."""


def _table() -> tuple[Row, ...]:
    b, h, o = "blocks.{n}.", "model.layers.{n}.", "block.{n}."
    attention, experts = "attention.", "moe.experts."
    rows = [
        Row("embedding.weight", "model.embed_tokens.weight", "embedding.weight",
            ("vocab", "hidden")),
        Row(b + "attention_norm.weight", h + "input_layernorm.weight", o + "attn.norm.scale",
            ("hidden",)),
    ]  # fmt: skip
    for part, (p, out) in enumerate([("q", "query"), ("k", "key"), ("v", "key")]):
        for kind, shape in (("weight", (out, "hidden")), ("bias", (out,))):
            leaf = f"{p}_proj.{kind}"
            rows.append(
                Row(b + attention + leaf, h + "self_attn." + leaf, o + f"attn.qkv.{kind}", shape,
                    fused=part)
            )  # fmt: skip
    rows += [
        Row(b + "attention.o_proj.weight", h + "self_attn.o_proj.weight", o + "attn.out.weight",
            ("hidden", "query")),
        Row(b + "attention.o_proj.bias", h + "self_attn.o_proj.bias", o + "attn.out.bias",
            ("hidden",)),
        Row(b + "attention.sinks.weight", h + "self_attn.sinks", o + "attn.sinks", ("heads",)),
        Row(b + "moe_norm.weight", h + "post_attention_layernorm.weight", o + "mlp.norm.scale",
            ("hidden",)),
        Row(b + "moe.router.weight", h + "mlp.router.weight", o + "mlp.gate.weight",
            ("experts", "hidden")),
        Row(b + "moe.router.bias", h + "mlp.router.bias", o + "mlp.gate.bias", ("experts",)),
        Row(b + experts + "gate_up_weight", h + "mlp.experts.gate_up_proj", o + "mlp.mlp1_weight",
            ("experts", "two_inner", "hidden"), expert_matrix=True),
        Row(b + experts + "gate_up_bias", h + "mlp.experts.gate_up_proj_bias", o + "mlp.mlp1_bias",
            ("experts", "two_inner")),
        Row(b + experts + "down_weight", h + "mlp.experts.down_proj", o + "mlp.mlp2_weight",
            ("experts", "hidden", "inner"), expert_matrix=True),
        Row(b + experts + "down_bias", h + "mlp.experts.down_proj_bias", o + "mlp.mlp2_bias",
            ("experts", "hidden")),
        Row("norm.weight", "model.norm.weight", "norm.scale", ("hidden",)),
        Row("lm_head.weight", "lm_head.weight", "unembedding.weight", ("vocab", "hidden")),
    ]  # fmt: skip
    return tuple(rows)


TABLE = _table()

HUGGING_FACE_PACKED = ("_blocks", "_scales")
"""Ends of the two tensors that stand for an expert's matrix, after its Hugging Face name."""
ORIGINAL_PACKED = (".blocks", ".scales")


def dims(config: ModelConfig) -> dict[str, int]:
    """The words of `Row.shape`, as numbers."""
    return {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "query": config.num_attention_heads * config.head_dim,
        "key": config.num_key_value_heads * config.head_dim,
        "heads": config.num_attention_heads,
        "experts": config.num_local_experts,
        "inner": config.intermediate_size,
        "two_inner": 2 * config.intermediate_size,
    }


def rows(config: ModelConfig) -> dict[str, Row]:
    """Native name -> row, its names filled in, for every weight of a model, first layer first."""
    before = [row for row in TABLE if row.native == "embedding.weight"]
    layer = [row for row in TABLE if "{n}" in row.native]
    after = [row for row in TABLE if "{n}" not in row.native and row not in before]
    filled = [*before, *(_fill(r, n) for n in range(config.num_hidden_layers) for r in layer)]
    return {row.native: row for row in [*filled, *after]}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Native name -> shape of every weight of a model."""
    size = dims(config)
    return {name: tuple(size[word] for word in row.shape) for name, row in rows(config).items()}


def to_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native weights or gradients, any subset of them, under Hugging Face's bfloat16 names.

    Experts' matrices are turned to (experts, in, out) as views of what was given: call
    `.contiguous()` on what is to be written to a file.

    Raises:
        UnknownTensor: a name has no row in the table.
    """
    return _rename(tensors, {row.native: row for row in TABLE}, lambda row: row.hugging_face)


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hugging_face`, for weights in bfloat16 layout (not MXFP4)."""
    return _rename(tensors, {row.hugging_face: row for row in TABLE}, lambda row: row.native)


def _rename(
    tensors: Mapping[str, Tensor], by_name: dict[str, Row], target: Callable[[Row], str]
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in tensors.items():
        pattern, number = _number(name)
        row = by_name.get(pattern)
        if row is None or ("{n}" in row.native) != (number is not None):
            unknown.append(name)
        else:
            renamed[target(_fill(row, number))] = value.mT if row.expert_matrix else value
    if unknown:
        raise UnknownTensor(unknown_sentence(unknown))
    return renamed


def unknown_sentence(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"no row in the table of names for {', '.join(names[:3])}{more}"


def _number(name: str) -> tuple[str, int | None]:
    """The name with {n} for its layer, and the layer; numbers are written without leading zeros."""
    found = re.search(r"\.(0|[1-9]\d*)\.", name)
    if not found:
        return name, None
    return f"{name[: found.start()]}.{{n}}.{name[found.end() :]}", int(found[1])


def _fill(row: Row, layer: int | None) -> Row:
    native, hugging_face, original = (name.format(n=layer) for name in row[:3])
    return row._replace(native=native, hugging_face=hugging_face, original=original)
