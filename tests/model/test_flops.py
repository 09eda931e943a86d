"""Counts and FLOPs against the published numbers and against a built model."""

import dataclasses

import pytest
import torch

from ossature.model import flops
from ossature.model.config import DEBUG, GPT_OSS_20B, GPT_OSS_120B
from ossature.model.transformer import Transformer


def test_parameter_counts_are_the_published_ones():
    assert flops.parameters(GPT_OSS_20B) == 20_914_757_184
    assert flops.parameters(GPT_OSS_120B) == 116_829_156_672
    assert flops.active_parameters(GPT_OSS_20B) == 3_608_307_264
    assert flops.active_parameters(GPT_OSS_120B) == 5_132_849_472
    assert flops.expert_weights(GPT_OSS_20B) == 19_110_297_600
    assert flops.expert_weights(GPT_OSS_120B) == 114_661_785_600
    assert flops.matmul_parameters(GPT_OSS_20B) == 3_607_142_400
    assert flops.matmul_parameters(GPT_OSS_120B) == 5_131_100_160


def test_the_formula_counts_what_a_model_holds():
    assert flops.parameters(DEBUG) == sum(p.numel() for p in Transformer(DEBUG).parameters())


@pytest.mark.parametrize(
    ("config", "seq_len", "expected"),
    [
        (GPT_OSS_20B, 4096, 22_925_435_904),
        (GPT_OSS_20B, 8192, 24_133_980_672),
        (GPT_OSS_120B, 4096, 32_710_473_216),
        (GPT_OSS_120B, 8192, 34_523_290_368),
    ],
)
def test_flops_know_the_window(config, seq_len, expected):
    assert flops.flops_per_token(config, seq_len) == expected


def test_mean_keys_are_those_of_the_mask():
    from ossature.model.attention import attention_mask

    for window in (None, 1, 5, 12, 40):
        mask = attention_mask(torch.zeros(1, 12, dtype=torch.int64), window)
        assert flops.mean_keys(12, window) == pytest.approx(mask.sum().item() / 12)


def test_layers_are_charged_by_their_own_type():
    full = dataclasses.replace(GPT_OSS_20B, layer_types=("full_attention",) * 24)

    assert flops.flops_per_token(full, 4096) == 24_059_363_328
