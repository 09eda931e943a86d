"""A prepacked model beside the plain one: the same numbers, but for how bfloat16 rounds."""

import pytest
import torch

from ossature.model.config import ModelConfig
from ossature.model.prepacked import can_prepack, prepack
from ossature.model.transformer import Transformer
from ossature.sample.generate import generate
from tests.tiny import SHAPES, random_tokens


def models(dtype: torch.dtype = torch.bfloat16) -> tuple[Transformer, Transformer]:
    found = []
    for _ in range(2):
        # All experts for every token: rounding then changes no choice.
        shape = SHAPES["oblong"] | {"num_experts_per_tok": 8}
        model = Transformer(ModelConfig(**shape)).requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        found.append(model.to(dtype).eval())
    return found[0], found[1]


@pytest.mark.parametrize("shape", [(16, 1), (2, 9), (1, 100)])
@torch.no_grad()
def test_a_prepacked_model_is_as_near_to_exact_as_the_plain_one(shape: tuple[int, int]):
    plain, packed = models()
    if not can_prepack(packed):
        pytest.skip("no bfloat16 in oneDNN here")
    exact = Transformer(plain.config).double()
    exact.load_state_dict(plain.state_dict())
    tokens = random_tokens(*shape, 96)
    true = exact(tokens)
    prepack(packed)

    error = (packed(tokens) - true).norm() / true.norm()

    assert error < 1.2 * (plain(tokens) - true).norm() / true.norm()
    assert error < 0.05


@torch.no_grad()
def test_every_large_matrix_is_taken_once_and_none_is_left():
    _, packed = models()
    if not can_prepack(packed):
        pytest.skip("no bfloat16 in oneDNN here")
    prepack(packed)

    left = {name.rpartition("blocks.")[2] for name, p in packed.named_parameters() if p.ndim > 1}
    ends = {name.partition(".")[2] for name in left if name[0].isdigit()}
    assert ends == {
        "moe.router.weight", "moe.experts.gate_up_bias", "moe.experts.down_bias",
    }  # fmt: skip
    assert generate(packed, [[5, 6, 7], [8]], 12).shape == (2, 15)


def test_other_models_stay_as_they_are():
    assert not can_prepack(models(torch.float32)[0])
