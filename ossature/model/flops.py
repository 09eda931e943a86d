"""Parameters and training FLOPs of a model by formula, before anything is built.

FLOPs count what the mathematics needs: a sliding layer is charged for the keys in its window,
and a causal one for the keys before the query.  Charging full attention to windowed layers
overstates the MFU of gpt-oss at 8,192 tokens by 18 %.
"""

from __future__ import annotations

from ossature.config import LoraConfig
from ossature.model.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """All parameters."""
    per_layer = (
        _attention_weights(config)
        + _attention_biases(config)
        + 2 * config.hidden_size  # norms
        + _router_weights(config)
        + config.num_local_experts
        + config.num_local_experts * _expert(config)
    )
    embeddings = 2 * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * per_layer + embeddings + config.hidden_size


def active_parameters(config: ModelConfig) -> int:
    """Parameters a token meets, without the embedding (the convention of the model card)."""
    idle = config.num_local_experts - config.num_experts_per_tok
    skipped = config.num_hidden_layers * idle * _expert(config)
    return parameters(config) - skipped - config.vocab_size * config.hidden_size


def expert_weights(config: ModelConfig) -> int:
    """Weights that MXFP4 formats store in 4 bits: the experts' matrices, without biases."""
    matrices = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * config.num_local_experts * matrices


def matmul_parameters(config: ModelConfig) -> int:
    """Weights a token is multiplied with: no biases, norms, sinks, and no embedding lookup."""
    chosen = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    per_layer = _attention_weights(config) + _router_weights(config) + chosen
    return config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a query sees on average over a row of one document."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return window - window * (window - 1) / (2 * seq_len)


def flops_per_token(config: ModelConfig, seq_len: int, lora: LoraConfig | None = None) -> float:
    """FLOPs of forward and backward for one token of a row of one document of `seq_len`.

    Nothing is added for activations that are computed again.  A frozen matrix has no gradient: it
    counts twice, not three times.  Nothing is added for DoRA's norms and for unpacking.
    """
    keys = sum(mean_keys(seq_len, config.window(n)) for n in range(config.num_hidden_layers))
    attention = 4 * config.num_attention_heads * config.head_dim * keys
    matrices = 2 * matmul_parameters(config)
    if lora is None or not lora.rank:
        return 3 * (matrices + attention)
    return 2 * matrices + 3 * (2 * active_adapters(config, lora) + attention)


def active_adapters(config: ModelConfig, lora: LoraConfig) -> int:
    """Weights of adapters that a token is multiplied with; A of the embedding is a lookup."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    in_block = {
        "q_proj": hidden + query,
        "k_proj": hidden + key,
        "v_proj": hidden + key,
        "o_proj": query + hidden,
        "router": hidden + config.num_local_experts,
        "gate_up": config.num_experts_per_tok * (hidden + 2 * inner),
        "down": config.num_experts_per_tok * (inner + hidden),
    }
    once = {"embedding": hidden, "lm_head": hidden + config.vocab_size}
    both = {name: config.num_hidden_layers * size for name, size in in_block.items()} | once
    return lora.rank * sum(both[target] for target in lora.targets)


def _attention_weights(config: ModelConfig) -> int:
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


def _attention_biases(config: ModelConfig) -> int:
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads * config.head_dim + config.hidden_size + config.num_attention_heads  # and sinks


def _router_weights(config: ModelConfig) -> int:
    return config.num_local_experts * config.hidden_size


def _expert(config: ModelConfig) -> int:
    hidden, inner = config.hidden_size, config.intermediate_size
    return 3 * hidden * inner + 2 * inner + hidden
