"""Tiny gpt-oss models with random weights: transformers' as the oracle, and ours beside it.

Every weight is drawn large enough to matter: non-zero biases, sinks and router biases, SwiGLU
inputs past its limits.  A model at its small initialisation would hide most mistakes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    # No two dimensions are equal: a transposed or swapped weight does not fit.
    "oblong": {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 7,
    },
    # Everything that can be is equal, as in the published sizes: only numbers tell.
    "square": {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
    },
}  # fmt: skip

# Standard deviation of every weight, by the end of its Hugging Face name; biases of the experts
# push a few percent of the gates and ups past the limit of 7.
_SCALES = {
    "embed_tokens.weight": 1.0,
    "lm_head.weight": 0.2,
    "sinks": 1.0,
    "router.weight": 0.2,
    "router.bias": 0.3,
    "gate_up_proj": 0.5,
    "gate_up_proj_bias": 1.5,
    "down_proj": 0.05,
    "down_proj_bias": 0.1,
    "o_proj.weight": 0.1,
    "proj.weight": 0.25,
    "proj.bias": 0.3,
}


def hugging_face_config(shape: str = "oblong", **changes: Any) -> GptOssConfig:
    """transformers' config of a shape of SHAPES, with fields changed."""
    fields: dict[str, Any] = {
        **SHAPES[shape],
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131_072,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "use_cache": True,
    }  # fmt: skip
    return GptOssConfig(**{**fields, **changes})


def hugging_face_model(
    shape: str = "oblong", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> GptOssForCausalLM:
    """transformers' model, eager throughout, with random weights that bfloat16 holds exactly."""
    config = hugging_face_config(shape, **changes)
    model = GptOssForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * _scale(name)
            if name.endswith("norm.weight"):
                values += 1.0
            parameter.copy_(values.bfloat16())
    return model.eval()


def _scale(name: str) -> float:
    if name.endswith("norm.weight"):
        return 0.1
    return _SCALES[max((end for end in _SCALES if name.endswith(end)), key=len)]


def random_tokens(batch: int, seq: int, vocab_size: int, seed: int = 0) -> Tensor:
    """(batch, seq) ids from 2 up: 0 and 1 are the padding and the end of the tiny configs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (batch, seq), generator=generator)


def ours(theirs: GptOssForCausalLM, **forms: str):
    """Our model with the very weights of transformers' model, in float32, by way of the table."""
    from ossature.convert import from_hugging_face
    from ossature.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(native_config(theirs.config), **forms)  # type: ignore[arg-type]
    state = from_hugging_face({n: p.detach().float() for n, p in theirs.named_parameters()})
    model.load_state_dict({n: p.clone() for n, p in state.items()}, strict=True, assign=True)
    return model


def native_config(config: GptOssConfig):
    """Our config with the numbers of transformers', field by field."""
    from ossature.model.config import ModelConfig

    rope = config.rope_parameters
    return ModelConfig(
        **{name: getattr(config, name) for name in SHAPES["oblong"]},
        layer_types=tuple(config.layer_types),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_factor=rope["factor"],
        rope_beta_fast=rope["beta_fast"],
        rope_beta_slow=rope["beta_slow"],
        rope_original_context=rope["original_max_position_embeddings"],
        rope_truncate=rope["truncate"],
        max_position_embeddings=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )
