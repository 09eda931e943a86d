"""A prepacked model beside the plain one: the same numbers, but for how bfloat16 rounds.

That rows of float32 keep their bits is in tests/sample/test_engine.py.
"""

from dataclasses import replace

import pytest
import torch

from ossature.model.config import ModelConfig
from ossature.model.prepacked import PrepackedLinear, can_prepack, prepack, prepacked
from ossature.model.transformer import Transformer
from ossature.sample.generate import generate
from tests.tiny import SHAPES, random_tokens


def models(dtype: torch.dtype = torch.bfloat16) -> tuple[Transformer, Transformer]:
    # All experts for every token: rounding then changes no choice.
    shape = SHAPES["oblong"] | {"num_experts_per_tok": 8}
    plain, packed = (drawn(ModelConfig(**shape), 0.2).to(dtype) for _ in range(2))
    return plain, packed


def prepackable_model() -> Transformer:
    """In float32; oneDNN's order wants rows of whole vectors."""
    sizes = {"hidden_size": 80, "intermediate_size": 64, "num_attention_heads": 12}
    return drawn(ModelConfig(**(SHAPES["oblong"] | sizes)), 0.4)


def drawn(config: ModelConfig, std: float) -> Transformer:
    model = Transformer(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


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
    assert ends == {"moe.experts.gate_up_bias", "moe.experts.down_bias"}
    assert generate(packed, [[5, 6, 7], [8]], 12).shape == (2, 15)


@pytest.mark.parametrize("shape", [(16, 1), (1, 1), (2, 9), (1, 100)])
@torch.no_grad()
def test_in_float32_a_prepacked_model_computes_what_the_plain_one_does(shape: tuple[int, int]):
    packed, tokens = prepackable_model(), random_tokens(*shape, 96)
    if not can_prepack(packed):
        pytest.skip("oneDNN's products depend on the number of rows here")
    expected = packed(tokens)

    prepack(packed)

    torch.testing.assert_close(packed(tokens), expected, atol=2e-5, rtol=1e-5)
    assert prepacked(packed) and not prepacked(prepackable_model())


@pytest.mark.parametrize("sizes", [{"intermediate_size": 96}, {"head_dim": 10}])
def test_in_float32_all_rows_must_be_of_whole_vectors(sizes: dict[str, int]):
    config = replace(prepackable_model().config, **sizes)

    assert not can_prepack(Transformer(config))


@torch.no_grad()
def test_in_float32_a_wide_row_has_the_same_bits_alone_and_among_others():
    """oneDNN multiplies one row of 4,096 numbers in another way than several."""
    if not can_prepack(prepackable_model()):
        pytest.skip("oneDNN's products depend on the number of rows here")
    linear, x = torch.nn.Linear(4096, 1024).requires_grad_(False), torch.randn(37, 4096)
    plain = linear(x)
    PrepackedLinear.adopt(linear)

    together = linear(x)

    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
    for n in (0, 5, 36):
        assert torch.equal(linear(x[n : n + 1]), together[n : n + 1])
        assert torch.equal(linear(x[None, n : n + 1]), together[None, n : n + 1])


def test_other_models_stay_as_they_are():
    plain, packed = (prepackable_model() for _ in range(2))
    assert not can_prepack(packed.double())
    plain.embedding.bfloat16()
    assert not can_prepack(plain)
    config = plain.config
    assert not can_prepack(Transformer(config, moe_form="eager"))
