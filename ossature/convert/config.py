"""config.json <-> ModelConfig: Hugging Face's file, old style and new, and OpenAI's.

Reading is total: a key is either understood, or on the list of those that say nothing about the
weights, or an error that names it.  Missing keys of Hugging Face's file take the defaults of
transformers' GptOssConfig, as they do there: the 120B shape, and `truncate` is true where a RoPE
table does not say.  Writing takes the old style ("v4": rope_scaling), which every version reads.

Source: published config.json of openai/gpt-oss-20b and -120b; configuration_gpt_oss.py and
modeling_rope_utils.py of transformers 5.23.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ossature.checkpoint.safetensors import json_object
from ossature.model.config import ModelConfig

# Hugging Face key -> (field, default of GptOssConfig).
_FIELDS: dict[str, Any] = {
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
}
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
_LAYERS = ("sliding_attention", "full_attention")
_ALIASES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
# Keys with one value that the architecture has; any other is another architecture.
_FIXED: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}
INERT = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache",
    "output_router_logits", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation",
    "unsloth_fixed", "unsloth_version", "task_specific_params", "model_max_length",
}  # fmt: skip
"""Keys of Hugging Face's file that say nothing about the weights or their mathematics."""
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
_ROPE_DEFAULT = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# OpenAI's key -> ours; its file has these keys and no others.
_ORIGINAL = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "rope_original_context",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "rope_beta_slow",
    "rope_ntk_beta": "rope_beta_fast",
}
HARMONY_VOCABULARY = 201_088
"""Rows of the published models; with them go the token ids that are ModelConfig's defaults."""


def read_config(path: Path | str) -> ModelConfig:
    """The shape that a config.json describes, in any of the three styles.

    Raises:
        ValueError: a key is unknown, contradicts another, or describes another architecture.
    """
    path = Path(path)
    table = read_json(path)
    fields = _from_hugging_face if "model_type" in table else _from_original
    try:
        return ModelConfig(**fields(dict(table)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, none of whose keys is there twice."""
    return json_object(path, path.read_bytes())


def hugging_face_config(
    config: ModelConfig, dtype: str = "bfloat16", mxfp4: bool = False
) -> dict[str, Any]:
    """The published config.json, with this model's numbers.

    Args:
        dtype: of the weights.  Stated under both of its names, the old and the new, except for
            MXFP4, whose published file has neither.
    """
    table: dict[str, Any] = {key: getattr(config, key) for key in _FIELDS}
    if config.swiglu_alpha == _FIELDS["swiglu_alpha"]:
        del table["swiglu_alpha"]  # fixed in the old style
    table |= {
        "architectures": ["GptOssForCausalLM"],
        "experts_per_token": config.num_experts_per_tok,
        "initial_context_length": config.rope_original_context,
        "layer_types": list(config.layer_types),
        "output_router_logits": False,
        "rope_scaling": {
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_context,
            "rope_type": "yarn",
            "truncate": config.rope_truncate,
        },
        "rope_theta": _whole(config.rope_theta),
        "transformers_version": "4.55.0.dev0",  # the style's
        "use_cache": True,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    table |= {key: value for key, value in _FIXED.items() if key != "is_encoder_decoder"}
    if config.bos_token_id is not None:
        table["bos_token_id"] = config.bos_token_id
    if mxfp4:
        table["quantization_config"] = QUANTIZATION
    else:
        table |= {"dtype": dtype, "torch_dtype": dtype}
    return dict(sorted(table.items()))


def original_config(config: ModelConfig) -> dict[str, Any]:
    """OpenAI's config.json, with this model's numbers.

    Raises:
        ValueError: the model computes something that this file cannot say.
    """
    published = ModelConfig(num_hidden_layers=config.num_hidden_layers)
    for name in ("rms_norm_eps", "swiglu_alpha", "layer_types", "rope_truncate"):
        if getattr(config, name) != getattr(published, name):
            value = "other than alternating" if name == "layer_types" else getattr(config, name)
            raise ValueError(f"{name} ({value}) has no place in OpenAI's format")
    table = {theirs: getattr(config, ours) for theirs, ours in _ORIGINAL.items()}
    for key in ("rope_theta", "rope_ntk_alpha", "rope_ntk_beta"):
        table[key] = _whole(table[key])
    return table


def _from_hugging_face(table: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig; every key of the table is used up."""
    for key, value in _FIXED.items():
        if table.pop(key, value) != value:
            raise ValueError(f"{key} must be {json.dumps(value)}: gpt-oss has no other")
    check_quantization(table.pop("quantization_config", None))
    for alias, key in _ALIASES.items():
        if alias in table:
            _agree(alias, table.pop(alias), key, table.setdefault(key, _ABSENT), table)
    fields: dict[str, Any] = {}
    for key, default in _FIELDS.items():
        fields[key] = _number(key, table.pop(key, default), type(default))
    for key in _TOKENS:
        value = table.pop(key, None)
        fields[key] = None if value is None else _number(key, value, int)
    layer_types = table.pop("layer_types", None)
    if layer_types is not None:
        if not isinstance(layer_types, list) or not set(map(str, layer_types)) <= set(_LAYERS):
            raise ValueError(f"layer_types must be a list of {' and '.join(_LAYERS)}")
        if not layer_types:
            raise ValueError("layer_types has 0 entries; leave it out for alternating layers")
        fields["layer_types"] = tuple(layer_types)
    fields |= _rope(table, fields["max_position_embeddings"])
    unknown = sorted(table.keys() - INERT)
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}")
    return fields


_ABSENT = object()


def _agree(alias: str, value: Any, key: str, other: Any, table: dict[str, Any]) -> None:
    """Let an alias stand for its key; both may be there if they say the same."""
    if other is _ABSENT:
        table[key] = value
    elif other != value:
        raise ValueError(f"{alias} ({value}) contradicts {key} ({other})")


def _rope(table: dict[str, Any], max_position: int) -> dict[str, Any]:
    """The fields rope_*; takes its keys out of the table."""
    new, old = table.pop("rope_parameters", None), table.pop("rope_scaling", None)
    for key, rope in [("rope_parameters", new), ("rope_scaling", old)]:
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"{key} ({json.dumps(rope)}) must be a table")
    if new and old and new != old:
        raise ValueError("rope_scaling contradicts rope_parameters")
    rope = dict(new or old or _ROPE_DEFAULT)
    theta = table.pop("rope_theta", None)
    if theta is not None:
        _agree("rope_theta", theta, "rope_theta", rope.setdefault("rope_theta", _ABSENT), rope)
    kind = rope.pop("rope_type", None) or rope.get("type", "default")
    rope.pop("type", None)
    fields = {"rope_theta": _number("rope_theta", rope.pop("rope_theta", 150_000.0), float)}
    if kind == "default":
        fields["rope_factor"] = 1.0
        rope.pop("factor", None)
    elif kind == "yarn":
        if "factor" not in rope:
            raise ValueError("rope_scaling has no factor")
        fields["rope_factor"] = _number("factor", rope.pop("factor"), float)
    else:
        raise ValueError(f"rope_type ({kind!r}) must be yarn or default")
    fields["rope_beta_fast"] = _number("beta_fast", rope.pop("beta_fast", 32.0), float)
    fields["rope_beta_slow"] = _number("beta_slow", rope.pop("beta_slow", 1.0), float)
    context = _number(
        "original_max_position_embeddings",
        rope.pop("original_max_position_embeddings", max_position),
        int,
    )
    duplicate = table.pop("initial_context_length", context)
    if duplicate != context and kind == "yarn":
        raise ValueError(
            f"initial_context_length ({duplicate}) contradicts "
            f"original_max_position_embeddings ({context})"
        )
    fields["rope_original_context"] = context
    truncate = rope.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate ({truncate!r}) must be true or false")
    fields["rope_truncate"] = truncate
    for key, value in rope.items():
        if value is not None:
            raise ValueError(f"unknown key {key} of the RoPE table")
    return fields


def check_quantization(table: Any) -> None:
    """Refuse weights that are stored in any other way than MXFP4."""
    if table is None:
        return
    if not isinstance(table, dict):
        raise ValueError("quantization_config must be a table")
    method = table.get("quant_method")
    if method != "mxfp4":
        raise ValueError(f"quant_method ({method!r}) must be mxfp4, or quantization_config absent")
    unknown = sorted(table.keys() - QUANTIZATION.keys() - {"dequantize"})
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} of quantization_config")


def _from_original(table: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for theirs, ours in _ORIGINAL.items():
        if theirs not in table:
            raise ValueError(f"has neither model_type, as Hugging Face's, nor {theirs}")
        fields[ours] = _number(theirs, table.pop(theirs), type(getattr(ModelConfig, ours)))
    if table:
        raise ValueError(f"unknown key {', '.join(sorted(table))}")
    fields["max_position_embeddings"] = int(fields["rope_original_context"] * fields["rope_factor"])
    if fields["vocab_size"] != HARMONY_VOCABULARY:
        fields |= {"eos_token_id": None, "pad_token_id": None}
    return fields


def _number(key: str, value: Any, kind: type) -> Any:
    """A whole number, or a float that may be written as one."""
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        what = "a number" if kind is float else "a whole number"
        raise ValueError(f"{key} ({json.dumps(value)}) must be {what}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError(f"{key} must be a number that a float can hold") from None


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
