"""The shape of a gpt-oss network: one frozen dataclass and the three named sizes.

Field names are those of the published `config.json` (Hugging Face style), with the nested
`rope_scaling` table flattened to `rope_*`.  Reading and writing the JSON files is
`ossature.convert.config`; this page imports no torch, so that `--help` stays fast.

Source: openai/gpt-oss-20b `config.json`; `gpt_oss/torch/model.py` of openai/gpt-oss@7b58334.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LayerType = Literal["sliding_attention", "full_attention"]

MOST = {
    "num_hidden_layers": 1000,
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim"),
        2**20,
    ),
    "num_local_experts": 2**16,
    "sliding_window": 2**31 - 1,
    "rope_original_context": 2**31 - 1,
    "max_position_embeddings": 2**31 - 1,
}  # fmt: skip
"""More than any network has: a file that says more is damaged, and to build what it says would
take all memory there is."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A fact about weights: what shape they have and which mathematics they were trained with.

    Raises:
        ValueError: if two fields contradict each other; the message names both.
    """

    vocab_size: int = 201_088
    """Rows of the embedding and of the head."""
    hidden_size: int = 2880
    intermediate_size: int = 2880
    """Inner width of one expert, after the gate."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    sliding_window: int = 128
    """Tokens a query of a sliding layer sees, its own included."""
    layer_types: tuple[LayerType, ...] = ()
    """One word a layer; empty means sliding, full, sliding, full, ..."""
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    """Context extension of YaRN; 1.0 is plain RoPE."""
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original_context: int = 4096
    """Tokens of context before the extension (`original_max_position_embeddings`)."""
    rope_truncate: bool = False
    """Round the YaRN ramp to whole dimensions; gpt-oss does not."""
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.9
    """Carried from file to file, never used in training: that is `router.aux_loss` of a run."""
    eos_token_id: int | None = 200_002
    pad_token_id: int | None = 199_999
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at most {most}")
        if not self.layer_types:
            words: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
            layer_types = tuple(words[n % 2] for n in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", layer_types)
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries, "
                f"num_hidden_layers is {self.num_hidden_layers}"
            )
        for word in self.layer_types:
            if word not in ("sliding_attention", "full_attention"):
                raise ValueError(
                    f"layer_types: {word!r} is neither sliding_attention nor full_attention"
                )
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
            "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "sliding_window",
            "rope_original_context",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        for name in (
            "rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow", "rms_norm_eps",
        ):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive and finite")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"num_local_experts ({self.num_local_experts})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs")

    def window(self, layer: int) -> int | None:
        """Tokens a query of this layer sees, its own included; None sees the whole document."""
        sliding = self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None


GPT_OSS_20B = ModelConfig()
GPT_OSS_120B = ModelConfig(num_hidden_layers=36, num_local_experts=128)

# No two dimensions are equal, and 6 queries per key-value head is not 2 key-value heads: a
# transposed or swapped weight must not fit.
DEBUG = ModelConfig(
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=8,
    num_experts_per_tok=4,
    sliding_window=64,
    rope_original_context=1024,
    max_position_embeddings=32_768,
    eos_token_id=None,
    pad_token_id=None,
)

SIZES: dict[str, ModelConfig] = {
    "debug": DEBUG,
    "20b": GPT_OSS_20B,
    "120b": GPT_OSS_120B,
}
