"""GGUF files as llama.cpp reads gpt-oss: names, metadata, and their weights under native names.

They differ from Hugging Face's folders in four ways besides names: gate and up are two tensors (one
here, their rows in turn), MXFP4 lies in other bytes (`ossature.checkpoint.gguf`), everything but
matrices is in float32, and config, tokenizer and chat template are fields of the one file.

llama.cpp computes with alpha 1.702 and a limit of 7 whatever a file says, alternates sliding and
full layers, and rounds the YaRN ramp to whole dimensions, which gpt-oss does not.

Source: conversion/gpt_oss.py, src/models/openai-moe.cpp and ggml/src/ggml.c
(ggml_rope_yarn_corr_dims) of ggml-org/llama.cpp; gguf/constants.py of its package gguf 0.19.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ossature.checkpoint.box import Box, rows
from ossature.checkpoint.gguf import GROUP, GROUP_BYTES, MXFP4, PLAIN, WORDS, GgufFile, from_groups
from ossature.checkpoint.safetensors import Spec
from ossature.convert.layout import Format
from ossature.convert.names import UnknownTensor, shapes, unknown_sentence
from ossature.convert.source import missing_sentence
from ossature.kernels.mxfp4 import NOT_A_NUMBER, dequantize
from ossature.model.config import ModelConfig

ARCHITECTURE = "gpt-oss"
TRUNCATE = "ossature.rope_truncate"
"""The one thing a file of llama.cpp has no word for; it skips keys it does not know."""
# Field of ModelConfig -> key; all are there in a file.
_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "sliding_window": "attention.sliding_window",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_factor": "rope.scaling.factor",
    "rope_original_context": "rope.scaling.original_context_length",
    "rope_beta_fast": "rope.scaling.yarn_beta_fast",
    "rope_beta_slow": "rope.scaling.yarn_beta_slow",
}
_DEFAULTED = ("rope_beta_fast", "rope_beta_slow")
"""May be missing: llama.cpp then takes what gpt-oss has."""
# Key -> the field it repeats.
_AGAIN = {
    "attention.value_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
_SCALING = "rope.scaling.type"
_TOKENS = {
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
}
# End of a native name -> names in a file, without the layer's `blk.N.`.
_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.weight": ("token_embd.weight",),
    "norm.weight": ("output_norm.weight",),
    "lm_head.weight": ("output.weight",),
    "attention_norm.weight": ("attn_norm.weight",),
    "attention.q_proj.weight": ("attn_q.weight",),
    "attention.q_proj.bias": ("attn_q.bias",),
    "attention.k_proj.weight": ("attn_k.weight",),
    "attention.k_proj.bias": ("attn_k.bias",),
    "attention.v_proj.weight": ("attn_v.weight",),
    "attention.v_proj.bias": ("attn_v.bias",),
    "attention.o_proj.weight": ("attn_output.weight",),
    "attention.o_proj.bias": ("attn_output.bias",),
    "attention.sinks.weight": ("attn_sinks.weight",),
    "moe_norm.weight": ("post_attention_norm.weight",),
    "moe.router.weight": ("ffn_gate_inp.weight",),
    "moe.router.bias": ("ffn_gate_inp.bias",),
    "moe.experts.gate_up_weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "moe.experts.gate_up_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "moe.experts.down_weight": ("ffn_down_exps.weight",),
    "moe.experts.down_bias": ("ffn_down_exps.bias",),
}


class Stored(NamedTuple):
    """Where a weight is in a file."""

    names: tuple[str, ...]
    """One tensor, or gate's and up's: the even and the odd rows of the last dim but one (of
    matrices), or of the last (of biases)."""
    shape: tuple[int, ...]
    """Of each."""
    matrix: bool
    """In bfloat16 or MXFP4; all else is in float32."""


def layout(config: ModelConfig) -> dict[str, Stored]:
    """Native name -> place, for every weight of a model."""
    places: dict[str, Stored] = {}
    for name, shape in shapes(config).items():
        layer, end = "", name
        if name.startswith("blocks."):
            _, number, end = name.split(".", 2)
            layer = f"blk.{number}."
        names = tuple(layer + word for word in _NAMES[end])
        if len(names) == 2:
            shape = (shape[0], shape[1] // 2, *shape[2:])
        matrix = len(shape) > 1 and end.endswith("weight") and "router" not in end
        places[name] = Stored(names, shape, matrix)
    return places


def metadata(config: ModelConfig) -> dict[str, int | float | str | bool]:
    """The fields that say what is computed.

    Raises:
        ValueError: the model computes something that llama.cpp does not.
    """
    published = ModelConfig(num_hidden_layers=config.num_hidden_layers)
    for name in ("swiglu_alpha", "swiglu_limit", "layer_types"):
        if getattr(config, name) != getattr(published, name):
            value = "other than alternating" if name == "layer_types" else getattr(config, name)
            raise ValueError(f"{name} ({value}) has no place in a GGUF file of gpt-oss")
    table = {_key(key): getattr(config, name) for name, key in _KEYS.items()}
    repeated = ("attention.value_length", "feed_forward_length", "vocab_size")
    table |= {_key(key): getattr(config, _AGAIN[key]) for key in repeated}
    return {**table, _key(_SCALING): "yarn", TRUNCATE: config.rope_truncate}


def read_metadata(fields: dict[str, Any], vocab_size: int, most_layers: int) -> ModelConfig:
    """The shape that the fields of a file describe; every key of this architecture is used up.

    Args:
        most_layers: a damaged number above this is refused before names are made of it.

    Raises:
        ValueError: a key is missing, unknown, of another type, or describes another model.
    """
    if fields.get("general.architecture") != ARCHITECTURE:
        raise ValueError(
            f"general.architecture ({fields.get('general.architecture')}) must be {ARCHITECTURE}"
        )
    prefix = _key("")
    left = {key[len(prefix) :]: v for key, v in fields.items() if key.startswith(prefix)}
    values: dict[str, Any] = {"vocab_size": vocab_size}
    for name, key in _KEYS.items():
        kind = type(getattr(ModelConfig, name))
        value = left.pop(key, getattr(ModelConfig, name) if name in _DEFAULTED else None)
        if type(value) is not kind:
            raise ValueError(f"{_key(key)} ({value!r}) must be a number of kind {kind.__name__}")
        values[name] = _shortest(value) if kind is float else value
    if values["num_hidden_layers"] > most_layers:
        raise ValueError(
            f"{_key('block_count')} ({values['num_hidden_layers']}) must be at most {most_layers}: "
            "the file has no more tensors"
        )
    for key, name in _AGAIN.items():
        if left.pop(key, values[name]) != values[name]:
            raise ValueError(f"{_key(key)} ({fields[_key(key)]}) must be {values[name]}")
    if left.pop(_SCALING, None) != "yarn":
        raise ValueError(f"{_key(_SCALING)} ({fields.get(_key(_SCALING))}) must be yarn")
    if left:
        raise ValueError(f"unknown key {', '.join(map(_key, sorted(left)))}")
    for name, key in _TOKENS.items():
        value = values[name] = fields.get(key)
        if value is not None and not (type(value) is int and 0 <= value < vocab_size):
            raise ValueError(f"{key} ({value!r}) must be a token of the {vocab_size} there are")
    truncate = fields.get(TRUNCATE, False)
    if not isinstance(truncate, bool):
        raise ValueError(f"{TRUNCATE} ({truncate!r}) must be true or false")
    return ModelConfig(**values, rope_truncate=truncate)


def _key(end: str) -> str:
    return f"{ARCHITECTURE}.{end}"


def _shortest(value: float) -> float:
    """The number of fewest digits that is this one in 32 bits: 1e-05, and not 9.99999975e-06."""
    for digits in range(1, 10):
        near = float(f"{value:.{digits}g}")
        if struct.pack("<f", near) == struct.pack("<f", value):
            return near
    return value


class GgufSource:
    """The weights of a file.

    Raises:
        UnknownTensor: a tensor in the file is not of this model.
        ValueError: the file is damaged, a tensor is missing, or of another shape or type.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path
        self.format: Format = "gguf"
        self.files: list[Path] = []
        self.file = GgufFile(path)
        try:
            embedding = self.file.places.get("token_embd.weight")
            if embedding is None:
                raise ValueError("lacks token_embd.weight")
            self.config = read_metadata(self.file.fields, embedding.shape[0], len(self.file.places))
            self._layout = layout(self.config)
            self._shapes = shapes(self.config)
            self._check()
        except (ValueError, UnknownTensor) as error:
            self.file.close()
            raise type(error)(f"{path}: {error}") from None

    def _check(self) -> None:
        places = self.file.places
        wanted = {name: stored for stored in self._layout.values() for name in stored.names}
        if unknown := [name for name in places if name not in wanted]:
            raise UnknownTensor(unknown_sentence(unknown))
        if missing := [name for name in wanted if name not in places]:
            raise ValueError(missing_sentence(missing))
        for native, stored in self._layout.items():
            for name in stored.names:
                type, shape, _ = places[name]
                if shape != stored.shape:
                    raise ValueError(f"{name} has shape {shape}, the fields make it {stored.shape}")
                if type == MXFP4 and ".experts." not in native:
                    raise ValueError(f"{name} is MXFP4, which only experts' matrices are")
                if type != places[stored.names[0]].type:
                    raise ValueError(f"{name} is {WORDS[type]}, and {stored.names[0]} is not")

    def names(self) -> list[str]:
        return list(self._layout)

    def spec(self, name: str) -> Spec:
        type = self.file.places[self._layout[name].names[0]].type
        return Spec(PLAIN.get(type, torch.bfloat16), self._shapes[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.part(name, rows(self._shapes[name], start, stop))

    def part(self, name: str, box: Box) -> Tensor:
        """No other bytes are read, but for whole groups of MXFP4."""
        if not self._packed(name):
            return self._joined(name, box)
        *outer, last = box
        groups = slice(last.start // GROUP, -(-last.stop // GROUP))
        first = groups.start * GROUP
        numbers = dequantize(*self._groups(name, (*outer, groups)))
        return numbers[..., last.start - first : last.stop - first]

    def packed(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        if not self._packed(name):
            return None
        *shape, columns = self._shapes[name]
        return self._groups(name, rows((*shape, columns // GROUP), start, stop))

    def close(self) -> None:
        self.file.close()

    def _packed(self, name: str) -> bool:
        return self.file.places[self._layout[name].names[0]].type == MXFP4

    def _groups(self, name: str, box: Box) -> tuple[Tensor, Tensor]:
        """Blocks and scales; the last range counts groups."""
        *outer, last = box
        bytes_ = slice(last.start * GROUP_BYTES, last.stop * GROUP_BYTES)
        blocks, scales = from_groups(self._joined(name, (*outer, bytes_)))
        if scales.numel() and int(scales.max()) == NOT_A_NUMBER:
            raise ValueError(
                f"{self.folder}: {self._layout[name].names[0]} or its twin has a scale of "
                f"{NOT_A_NUMBER}, which in MXFP4 stands for no number: the file is damaged"
            )
        return blocks, scales

    def _joined(self, name: str, box: Box) -> Tensor:
        """A box of a weight's numbers, or bytes, with the rows of gate and up in turn."""
        names = self._layout[name].names
        if len(names) == 1:
            return self.file.box(names[0], box)
        experts, both, *rest = box
        parts = []
        for turn, part in enumerate(names):  # rows 2 j + turn of the weight are rows j of the part
            own = slice((both.start + 1 - turn) // 2, (both.stop + 1 - turn) // 2)
            parts.append(self.file.box(part, (experts, own, *rest)))
        out = parts[0].new_empty(parts[0].shape[0], both.stop - both.start, *parts[0].shape[2:])
        for turn, part in enumerate(parts):
            out[:, (both.start + turn) % 2 :: 2] = part
        return out
