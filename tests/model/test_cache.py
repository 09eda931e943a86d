"""What is kept of sequences: bounds, rings, gaps; and cached = recomputed."""

import pytest
import torch

from ossature.model.cache import Cache
from tests.sample.test_generate import WINDOW, tiny_model
from tests.tiny import random_tokens


def read(model, cache: Cache, row: int, tokens: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    """Logits after each chunk of a row's sequence."""
    found, start = [], 0
    for size in sizes:
        found.append(model(tokens[None, start : start + size], cache=cache.prompt(row, size)))
        start += size
    return found


@pytest.mark.parametrize("forms", [{}, {"attention_form": "eager", "moe_form": "eager"}])
@torch.no_grad()
def test_logits_of_chunks_and_steps_are_recomputed_logits(forms: dict[str, str]):
    """Chunks shorter and longer than the window, then one token at a time, past it."""
    model = tiny_model(**forms)
    tokens = random_tokens(1, 6 * WINDOW, 96)[0]
    full = model(tokens[None])[0]
    cache = Cache(model.config, rows=2, tokens=60)
    row = cache.admit(6 * WINDOW)
    sizes = [1, 3, 2 * WINDOW, WINDOW]

    found = read(model, cache, row, tokens, *sizes)
    places = list(torch.tensor(sizes).cumsum(0) - 1)
    for place in range(sum(sizes), 6 * WINDOW):
        found.append(model(tokens[None, place : place + 1], cache=cache.step([row])))
        places.append(place)

    torch.testing.assert_close(
        torch.cat(found)[:, 0], full[torch.tensor(places)], atol=2e-5, rtol=1e-5
    )


@torch.no_grad()
def test_rows_step_together_as_alone_whatever_their_lengths_and_places():
    model = tiny_model()
    prompts = [random_tokens(1, size, 96, seed=size)[0] for size in (2 * WINDOW, 3, WINDOW)]
    cache = Cache(model.config, rows=4, tokens=90)
    rows = [cache.admit(30) for _ in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        read(model, cache, row, prompt[:-1], len(prompt) - 1)
    last = torch.stack([prompt[-1:] for prompt in prompts])

    for order in ([0, 1, 2], [2, 0]):
        for row in rows:
            cache.length[row] = len(prompts[row]) - 1
        found = model(last[order], cache=cache.step(order, fill=0))
        for n, row in enumerate(order):
            full = model(prompts[row][None])[:, -1:]
            torch.testing.assert_close(found[n : n + 1], full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_store_is_tidied_when_its_gaps_are_too_small_and_nothing_is_lost():
    model = tiny_model()
    tokens = random_tokens(1, 12, 96)[0]
    cache = Cache(model.config, rows=3, tokens=45)
    first, second, third = (cache.admit(15) for _ in range(3))
    for row in (first, second, third):
        read(model, cache, row, tokens, 11)
    cache.leave(first)
    cache.leave(third)
    before = cache.stretch[second].start

    row = cache.admit(30)

    assert (before, cache.stretch[second].start, cache.stretch[row]) == (15, 0, range(15, 45))
    logits = model(tokens[None, 11:], cache=cache.step([second]))
    torch.testing.assert_close(logits, model(tokens[None])[:, -1:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copy_goes_its_own_way():
    model = tiny_model()
    tokens, other = random_tokens(2, 2 * WINDOW, 96)
    cache = Cache(model.config, rows=2, tokens=40)
    row, copied = cache.admit(20), cache.admit(20)
    read(model, cache, row, tokens, len(tokens) - 2)
    cache.copy(row, copied)

    for place in (-2, -1):
        pair = torch.stack([tokens[place], other[place]])[:, None]
        logits = model(pair, cache=cache.step([row, copied]))

    mixed = torch.cat([tokens[:-2], other[-2:]])
    full = torch.stack([model(x[None])[0, -1:] for x in (tokens, mixed)])
    torch.testing.assert_close(logits, full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_sliding_layers_hold_a_window_a_row_and_full_layers_the_bound():
    model = tiny_model()
    cache = Cache(model.config, rows=3, tokens=50)
    row = cache.admit(40)
    read(model, cache, row, random_tokens(1, 40, 96)[0], 40)

    shapes = [tuple(cache._layers[layer][0].shape[:-2]) for layer in range(4)]
    assert shapes == [(3, WINDOW), (50,), (3, WINDOW), (50,)]
    assert cache.free_tokens == 10 and cache.free_rows == 2


def test_a_full_row_says_so():
    model = tiny_model()
    cache = Cache(model.config, rows=1, tokens=9)
    row = cache.admit(4)
    cache.prompt(row, 4)

    with pytest.raises(ValueError, match="room for 4 tokens in row 0, not 5"):
        cache.step([row])
