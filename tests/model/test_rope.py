"""RoPE with YaRN against transformers, hand-made numbers and the golden tables."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ossature.model.config import GPT_OSS_20B
from ossature.model.rope import (
    concentration,
    inverse_frequencies,
    ramp_bounds,
    rotate,
    rotation,
)
from tests.golden import golden
from tests.tiny import hugging_face_config, native_config


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_frequencies_are_bit_equal_to_those_of_transformers(head_dim, truncate):
    theirs = hugging_face_config(head_dim=head_dim)
    theirs.rope_parameters["truncate"] = truncate
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    config = native_config(theirs)

    assert torch.equal(inverse_frequencies(config), expected)
    assert concentration(config) == scale


def test_the_ramp_of_gpt_oss_is_not_rounded():
    assert ramp_bounds(GPT_OSS_20B) == (8.092779115512402, 17.39802450158856)
    rounded = dataclasses.replace(GPT_OSS_20B, rope_truncate=True)
    assert ramp_bounds(rounded) == (8, 18)
    assert ramp_bounds(dataclasses.replace(GPT_OSS_20B, rope_original_context=131_072)) != (
        ramp_bounds(GPT_OSS_20B)
    )


def test_concentration_lengthens_every_head_at_every_position():
    x = torch.randn(1, 3, 2, 64, dtype=torch.float64)
    turn = rotation(GPT_OSS_20B, torch.tensor([[0, 77, 4000]]))

    ratio = rotate(x, turn).norm(dim=-1) / x.norm(dim=-1)

    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.3465735902799727), rtol=1e-6, atol=0)


def test_the_two_halves_turn_together_and_not_neighbours():
    """At position 1 the first pair, (x[0], x[32]), turns by one radian; the slow ones hardly."""
    plain = dataclasses.replace(GPT_OSS_20B, rope_factor=1.0)
    x = torch.zeros(1, 1, 1, 64)
    x[..., 0] = 1.0

    out = rotate(x, rotation(plain, torch.tensor([[1]])))[0, 0, 0]

    assert out.nonzero().flatten().tolist() == [0, 32]
    torch.testing.assert_close(out[[0, 32]], torch.tensor([0.5403023, 0.8414710]))


def test_tables_equal_the_golden_ones_up_to_position_131071():
    tables = load_file(golden("yarn_real.safetensors"))
    cos, sin = rotation(GPT_OSS_20B, tables["positions"][None].long())

    assert cos.dtype == torch.float32
    assert torch.equal(inverse_frequencies(GPT_OSS_20B), tables["inv_freq"])
    torch.testing.assert_close(cos[0], tables["cos"], rtol=0, atol=3e-7)
    torch.testing.assert_close(sin[0], tables["sin"], rtol=0, atol=3e-7)
    assert torch.equal(cos[0].bfloat16(), tables["cos_bf16"])
    assert torch.equal(sin[0].bfloat16(), tables["sin_bf16"])
