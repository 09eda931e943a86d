import pytest
import torch

from ossature.sample.sampling import check_sampling, choose, keep_top_k, keep_top_p

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order.
LOGITS = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [(0.0, [1]), (0.3, [1]), (0.5, [1, 3]), (0.75, [0, 1, 3]), (0.95, [0, 1, 2, 3])],
)
def test_the_token_that_crosses_top_p_stays(top_p: float, tokens: list[int]):
    assert kept(keep_top_p(LOGITS, top_p)) == tokens


def test_top_p_keeps_the_logits_of_what_stays_in_place():
    filtered = keep_top_p(LOGITS, 0.5)

    assert torch.equal(filtered[0, [1, 3]], LOGITS[0, [1, 3]])


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_k_most_probable_tokens(top_k: int, tokens: list[int]):
    assert kept(keep_top_k(LOGITS, top_k)) == tokens


def test_top_p_counts_the_probability_among_what_top_k_left():
    """0.4 and 0.3 alone are 4/7 and 3/7: the first already reaches 0.5, which 0.4 does not."""
    assert kept(keep_top_p(keep_top_k(LOGITS, 2), 0.5)) == [1]


def test_temperature_zero_takes_the_most_probable_token():
    assert choose(LOGITS.repeat(3, 1)).tolist() == [1, 1, 1]


def test_draws_follow_the_tempered_distribution():
    """At temperature 0.5 probabilities are squared: 4, 16, 1, 9 parts of 30."""
    generator = torch.Generator().manual_seed(3)
    draws = choose(LOGITS.repeat(30_000, 1), temperature=0.5, generator=generator)

    share = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(share, torch.tensor([4, 16, 1, 9]) / 30, atol=0.01, rtol=0)


def test_rows_are_filtered_each_by_itself():
    rows = torch.cat([LOGITS, LOGITS.flip(1)])

    assert torch.equal(keep_top_p(rows, 0.5)[1:], keep_top_p(rows[1:], 0.5))
    assert torch.equal(keep_top_k(rows, 2)[1:], keep_top_k(rows[1:], 2))


@pytest.mark.parametrize(
    ("numbers", "key"),
    [
        ((-0.1, 0, 1.0), "temperature"),
        ((float("nan"), 0, 1.0), "temperature"),
        ((1.0, -1, 1.0), "top_k"),
        ((1.0, 0, 1.5), "top_p"),
    ],
)
def test_numbers_out_of_range_are_named(numbers: tuple[float, int, float], key: str):
    with pytest.raises(ValueError, match=key):
        check_sampling(*numbers)
