"""Attention to kept keys against the eager form, with as many keys and queries as differ."""

import pytest
import torch

from ossature.kernels.kept_attention import _masked, attend_next, attend_ring, attend_stretches
from ossature.model.attention import attend

HEADS, KEY_HEADS, SIZE = 6, 2, 16


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SINKS = drawn(HEADS, seed=9)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 50])
@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (0, 13), (3, 5), (11, 1), (6, 20)])
def test_the_next_tokens_see_those_before_and_themselves(
    before: int, tokens: int, window: int | None
):
    end = before + tokens
    q, k, v = drawn(tokens, HEADS, SIZE), *drawn(2, end, KEY_HEADS, SIZE, seed=1)
    query, key = torch.arange(before, end)[:, None], torch.arange(end)
    mask = (key <= query) & (key > query - (window or end))

    found = attend_next(q, k, v, SINKS, before, window)

    expected = attend(q[None], k[None], v[None], sinks=SINKS, mask=mask[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_ring_is_seen_as_far_as_it_is_used():
    q, (k, v) = drawn(3, HEADS, SIZE), drawn(2, 3, 7, KEY_HEADS, SIZE, seed=1)
    used = torch.arange(7) < torch.tensor([[1], [5], [7]])
    expected = attend(q[:, None], k, v, sinks=SINKS, mask=used[:, None])[:, 0]

    for form in (attend_ring, _masked):
        torch.testing.assert_close(form(q, k, v, SINKS, used), expected, atol=1e-6, rtol=1e-5)


def test_each_row_sees_its_own_stretch():
    q, (k, v) = drawn(3, HEADS, SIZE), drawn(2, 40, KEY_HEADS, SIZE, seed=1)
    starts, lengths = [20, 0, 33], [9, 17, 1]

    found = attend_stretches(q, k, v, SINKS, starts, lengths)

    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mine = (x[None, start : start + length] for x in (k, v))
        mask = torch.ones(1, 1, length, dtype=torch.bool)
        expected = attend(q[n, None, None], *mine, sinks=SINKS, mask=mask)[0, 0]
        torch.testing.assert_close(found[n], expected, atol=1e-6, rtol=1e-5)
