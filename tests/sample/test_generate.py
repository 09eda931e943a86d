"""Sampling against transformers' `generate`, and against a model without a cache."""

import pytest
import torch

from ossature.model.config import ModelConfig
from ossature.model.transformer import Transformer
from ossature.sample.generate import generate
from tests.golden import golden
from tests.tiny import SHAPES, hugging_face_model, ours, random_tokens

WINDOW = SHAPES["oblong"]["sliding_window"]


def tiny_model(**forms: str) -> Transformer:
    """Weights large enough that every token matters to the next."""
    model = Transformer(ModelConfig(**SHAPES["oblong"]), **forms)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def recomputed(model: Transformer, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        logits = model(tokens)[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 13])
def test_greedy_text_is_transformers_token_for_token(shape: str, prompt: int):
    theirs = hugging_face_model(shape, seed=1)
    tokens = random_tokens(3, prompt, theirs.config.vocab_size)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(tokens, max_new_tokens=24, do_sample=False)

    assert torch.equal(generate(ours(theirs), tokens, max_new_tokens=24), expected)


def test_greedy_text_of_the_golden_model_is_the_published_one():
    from safetensors.torch import load_file

    import ossature

    io = load_file(golden("io.safetensors"))
    model = ossature.load_model(golden("hf_mxfp4"))

    assert torch.equal(generate(model, io["greedy_prompt"], 24), io["greedy_output"])


@pytest.mark.parametrize("forms", [{}, {"attention_form": "eager", "moe_form": "eager"}])
@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_cached_text_is_recomputed_text_past_the_window(forms: dict[str, str], prompt: int):
    model = tiny_model(**forms)
    tokens = random_tokens(2, prompt, 96)

    expected = recomputed(model, tokens, 2 * WINDOW + 3)

    assert torch.equal(generate(model, tokens, 2 * WINDOW + 3), expected)


def test_prompts_of_unequal_lengths_say_what_each_says_alone():
    model = tiny_model()
    prompts = [[5, 6, 7], list(range(10, 10 + 3 * WINDOW)), [4]]

    rows = generate(model, prompts, 2 * WINDOW, pad_id=9)

    for row, prompt in zip(rows, prompts, strict=True):
        padding = 3 * WINDOW - len(prompt)
        assert row[:padding].eq(9).all()
        assert torch.equal(row[padding:], generate(model, [prompt], 2 * WINDOW)[0])


def test_without_stop_ids_exactly_max_new_tokens_are_added():
    model = tiny_model()

    for new in (0, 1, 5):
        assert generate(model, random_tokens(2, 3, 96), new).shape == (2, 3 + new)


def test_a_row_ends_with_its_stop_id_and_is_filled_up():
    model = tiny_model()
    tokens = random_tokens(2, 6, 96)
    free = generate(model, tokens, 12)
    stop = free[0, 8].item()  # the third token of row 0
    ends = [(row[6:] == stop).nonzero().flatten().tolist() for row in free]
    assert ends[0][0] == 2 and ends[0] != ends[1], "choose another seed"

    out = generate(model, tokens, 12, stop_ids=(stop,), pad_id=-7)

    new = max((end[0] + 1 if end else 12) for end in ends)
    assert out.shape == (2, 6 + new)
    for row, unstopped, end in zip(out, free, ends, strict=True):
        length = 6 + (end[0] + 1 if end else 12)
        assert torch.equal(row[:length], unstopped[:length])
        assert row[length:].eq(-7).all()


def test_generation_ends_once_every_row_has_stopped():
    model = tiny_model()
    tokens = random_tokens(1, 6, 96)
    second = generate(model, tokens, 2)[0, 7].item()
    first = generate(model, tokens, 1)[0, 6].item()

    out = generate(model, tokens, 50, stop_ids={second})

    assert out.shape[1] == (7 if first == second else 8)


def test_the_same_seed_draws_the_same_text_and_leaves_the_global_state_alone():
    model, tokens = tiny_model(), random_tokens(2, 6, 96)
    before = torch.random.get_rng_state()

    draws = [generate(model, tokens, 20, temperature=1.5, seed=seed) for seed in (1, 1, 2)]

    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_top_k_of_one_is_greedy_at_any_temperature():
    model, tokens = tiny_model(), random_tokens(2, 6, 96)

    assert torch.equal(
        generate(model, tokens, 9, temperature=5.0, top_k=1, seed=0), generate(model, tokens, 9)
    )


def test_every_module_gets_its_mode_back():
    model = tiny_model().train()
    model.blocks["1"].eval()
    modes = [module.training for module in model.modules()]

    generate(model, random_tokens(1, 3, 96), 2)

    assert [module.training for module in model.modules()] == modes


def test_no_gradient_is_recorded_and_inference_mode_is_fine():
    model, tokens = tiny_model(), random_tokens(1, 3, 96)
    expected = generate(model, tokens, 10)

    with torch.inference_mode():
        assert torch.equal(generate(model, tokens, 10), expected)
    model(tokens).sum().backward()  # no inference tensor was left in the model


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([[1, 2], []], "prompt 1 is empty"),
        ([], "no prompt"),
        ([[96]], "token 96 is not in the model's vocabulary of 96"),
        (torch.zeros(2, 0, dtype=torch.int64), "prompt 0 is empty"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt, words: str):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model(), prompt)
