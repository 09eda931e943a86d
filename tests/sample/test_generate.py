"""Sampling against transformers' `generate`, and against a model without a cache."""

import pytest
import torch

from ossature.model.attention import attend
from ossature.model.cache import Cache, LayerCache, attend_kept
from ossature.model.config import ModelConfig
from ossature.model.transformer import Transformer
from ossature.sample.generate import batch_of, generate
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


def test_cached_logits_are_recomputed_logits():
    model = tiny_model()
    tokens = random_tokens(2, 4 * WINDOW, 96)
    full = model(tokens)
    cache = Cache(model.config, room=tokens.shape[1])

    cached = [model(tokens[:, :3], cache=cache)]
    cached += [model(tokens[:, place : place + 1], cache=cache) for place in range(3, 4 * WINDOW)]

    torch.testing.assert_close(torch.cat(cached, dim=1), full[:, 2:], atol=2e-5, rtol=1e-5)


def test_a_cached_row_goes_on_with_its_last_document_and_its_positions():
    model = tiny_model()
    tokens = random_tokens(1, 12, 96)
    document = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4]])
    position = torch.tensor([[0, 1, 2, 3, 100, 101, 102, 103, 104, 105, 106, 107]])
    cache = Cache(model.config, room=12)

    model(tokens[:, :6], document=document[:, :6], position=position[:, :6], cache=cache)
    cached = [model(tokens[:, place : place + 1], cache=cache) for place in range(6, 12)]

    full = model(tokens, document=document, position=position)[:, 6:]
    torch.testing.assert_close(torch.cat(cached, dim=1), full, atol=2e-5, rtol=1e-5)


def test_prompts_of_unequal_lengths_say_what_each_says_alone():
    model = tiny_model()
    prompts = [[5, 6, 7], list(range(10, 10 + 3 * WINDOW)), [4]]

    rows = generate(model, prompts, 2 * WINDOW, pad_id=9)

    for row, prompt in zip(rows, prompts, strict=True):
        padding = 3 * WINDOW - len(prompt)
        assert row[:padding].eq(9).all()
        assert torch.equal(row[padding:], generate(model, [prompt], 2 * WINDOW)[0])


def test_padding_in_front_belongs_to_no_document():
    tokens, document = batch_of([[5, 6, 7], [8]], pad_id=9)

    assert tokens.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert document.tolist() == [[0, 0, 0], [-1, -1, 0]]


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


def test_the_watcher_sees_every_token_and_may_end_rows():
    model, tokens = tiny_model(), random_tokens(2, 4, 96)
    free = generate(model, tokens, 6)
    seen: list[list[int | None]] = []

    def watch(new: list[int | None]) -> list[int]:
        seen.append(new)
        return [1] if len(seen) == 2 else []

    out = generate(model, tokens, 6, watch=watch, pad_id=-1)

    assert [row[0] for row in seen] == free[0, 4:].tolist()
    assert [row[1] for row in seen] == [*free[1, 4:6].tolist(), None, None, None, None]
    assert out[1, 6:].tolist() == [-1, -1, -1, -1]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([[1, 2], []], "prompt 1 is empty"),
        ([], "no prompt"),
        ([[96]], "token 96 is not in the model's vocabulary of 96"),
        (torch.zeros(2, 0, dtype=torch.int64), "empty prompt"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt, words: str):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model(), prompt)


def test_a_ring_keeps_the_newest_tokens_and_no_more():
    ring = LayerCache(slots=3)
    tokens = torch.arange(1.0, 9.0).view(1, 8, 1, 1)

    ring.extend(tokens[:, :5], tokens[:, :5])
    keys, _ = ring.extend(tokens[:, 5:6], tokens[:, 5:6])

    assert sorted(keys.flatten().tolist()) == [4, 5, 6]
    assert ring.extend(tokens[:, 6:7], tokens[:, 6:7])[0].shape == (1, 3, 1, 1)


def test_sliding_layers_hold_a_window_and_full_layers_the_row():
    model = tiny_model()
    cache = Cache(model.config, room=50)
    model(random_tokens(2, 40, 96), cache=cache)

    assert [layer._keys.shape[1] for layer in cache.layers] == [WINDOW, 50, WINDOW, 50]


def test_a_full_cache_says_so():
    model = tiny_model()
    cache = Cache(model.config, room=4)
    model(random_tokens(1, 4, 96), cache=cache)

    with pytest.raises(ValueError, match="room for 4 tokens"):
        model(random_tokens(1, 1, 96), cache=cache)


def test_a_cache_in_use_takes_one_token_at_a_time():
    model = tiny_model()
    cache = Cache(model.config, room=9)
    model(random_tokens(1, 4, 96), cache=cache)

    with pytest.raises(ValueError, match="one token a row"):
        model(random_tokens(1, 2, 96), cache=cache)


def test_attention_to_kept_keys_is_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 6, 16, generator=generator)
    k, v = torch.randn(2, 2, 9, 2, 16, generator=generator)
    sinks = torch.randn(6, generator=generator)
    mask = torch.rand(2, 1, 9, generator=generator) > 0.4

    expected = attend(q, k, v, sinks=sinks, mask=mask)

    torch.testing.assert_close(attend_kept(q, k, v, sinks=sinks, mask=mask), expected)
