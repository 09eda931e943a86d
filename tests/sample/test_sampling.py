"""The filters and draws by hand-made numbers."""

import pytest
import torch

from ossature.sample.options import SamplingOptions
from ossature.sample.sampling import Sampler, draw, keep_min_p, keep_top_k, keep_top_p, penalise

# Probabilities 0.4, 0.3, 0.2, 0.1, out of order.
LOGITS = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()


def kept(logits: torch.Tensor) -> list[int]:
    return logits[0].isfinite().nonzero().flatten().tolist()


def sampler(seed: int = 0, prompt: tuple[int, ...] = (), **options) -> Sampler:
    return Sampler(SamplingOptions(**options), seed, list(prompt), 4)


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


@pytest.mark.parametrize(
    ("min_p", "tokens"), [(0.0, [0, 1, 2, 3]), (0.3, [0, 1, 3]), (0.7, [1, 3]), (1.0, [1])]
)
def test_min_p_is_a_share_of_the_most_probable_token(min_p: float, tokens: list[int]):
    """0.4 x 0.3 = 0.12 cuts off 0.1; 0.4 x 0.7 = 0.28 cuts off 0.2 as well."""
    assert kept(keep_min_p(LOGITS, min_p)) == tokens


def test_top_p_counts_the_probability_among_what_top_k_left():
    """0.4 and 0.3 alone are 4/7 and 3/7: the first already reaches 0.5, which 0.4 does not."""
    assert kept(keep_top_p(keep_top_k(LOGITS, 2), 0.5)) == [1]


def test_seen_tokens_lose_by_a_factor_and_said_ones_by_a_difference():
    logits = torch.tensor([2.0, -2.0, 2.0, 1.0])
    seen = torch.tensor([True, True, True, False])
    said = torch.tensor([0.0, 0.0, 3.0, 0.0])

    assert penalise(logits, seen, said, 2.0, 0.25).tolist() == [1.0, -4.0, 0.75, 1.0]
    assert penalise(logits, seen, said, 2.0, 0.25, 0.5).tolist() == [1.0, -4.0, -0.75, 1.0]


def test_penalties_count_a_token_once_and_the_presence_penalty_not_the_prompt():
    logits = torch.tensor([3.0, 2.5, 2.0, 1.75])
    some = sampler(prompt=(0, 0), temperature=0.0, repetition_penalty=1.25, presence_penalty=0.5)
    said = []
    for _ in range(4):
        said.append(some.choose(logits))
        some.accept(said[-1])

    # 2.4 2.5 2 1.75; then 2.4 1.5 2 1.75; then 1.9 1.5 2 1.75; then 1.9 1.5 1.1 1.75.
    assert said == [1, 0, 2, 0]


def test_the_frequency_penalty_counts_every_time_and_not_the_prompt():
    logits = torch.tensor([3.0, 2.5, 2.0, 0.0])
    some = sampler(prompt=(0, 0), temperature=0.0, frequency_penalty=0.625)
    said = []
    for _ in range(6):
        said.append(some.choose(logits))
        some.accept(said[-1])

    # 3 2.5 2; 2.375 2.5 2; 2.375 1.875 2; 1.75 1.875 2; 1.75 1.875 1.375; 1.75 1.25 1.375.
    assert said == [0, 1, 0, 2, 1, 0]


def test_a_bias_is_added_to_the_logits_of_its_tokens():
    """0.4 x e^-100 is out of reach; and 0.1 x 8 is more than 0.4."""
    banned = sampler(temperature=0.0, logit_bias=((1, -100.0),))
    wanted = sampler(temperature=0.0, logit_bias=((2, 2.08), (0, 0.5)))

    assert not banned.plain and banned.choose(LOGITS[0]) == 3
    assert wanted.choose(LOGITS[0]) == 2
    drawn = {sampler(seed, logit_bias=((1, -100.0),)).choose(LOGITS[0]) for seed in range(60)}
    assert drawn == {0, 2, 3}


def test_temperature_zero_takes_the_most_probable_token():
    assert sampler(temperature=0.0).choose(LOGITS[0]) == 1


def test_a_constraint_leaves_the_most_probable_of_what_it_allows():
    allowed = torch.tensor([True, False, True, False])

    assert sampler(temperature=0.0).choose(LOGITS[0], allowed) == 0
    drawn = {sampler(seed).choose(LOGITS[0], allowed) for seed in range(40)}
    assert drawn == {0, 2}


@pytest.mark.parametrize(
    ("share", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.61, 2), (0.69, 2), (0.71, 3)]
)
def test_a_draw_is_the_place_in_the_added_up_probabilities(share: float, token: int):
    """0.2, 0.6, 0.7, 1.0."""
    assert draw(LOGITS[0], share) == token


def test_a_draw_never_takes_what_was_filtered_out():
    logits = torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf, -torch.inf])

    assert draw(logits, 0.0) == 1
    assert draw(logits, 1 - 2**-53) == 2


def test_draws_follow_the_tempered_distribution():
    """At temperature 0.5 probabilities are squared: 4, 16, 1, 9 parts of 30."""
    some = sampler(seed=3, temperature=0.5)
    draws = torch.tensor([some.choose(LOGITS[0]) for _ in range(4000)])

    share = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(share, torch.tensor([4, 16, 1, 9]) / 30, atol=0.025, rtol=0)


def test_rows_are_filtered_each_by_itself():
    rows = torch.cat([LOGITS, LOGITS.flip(1)])

    assert torch.equal(keep_top_p(rows, 0.5)[1:], keep_top_p(rows[1:], 0.5))
    assert torch.equal(keep_top_k(rows, 2)[1:], keep_top_k(rows[1:], 2))
    assert torch.equal(keep_min_p(rows, 0.6)[1:], keep_min_p(rows[1:], 0.6))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_k", -1), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")), ("max_new_tokens", 0), ("samples", 0),
        ("logprobs", -1), ("stop", ("a", "")), ("frequency_penalty", 101.0),
        ("logit_bias", ((1, 100.5),)), ("logit_bias", ((1, float("nan")),)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(name: str, value):
    with pytest.raises(ValueError, match=name):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("temperature", [1e-38, 1e-320])
def test_hardly_any_temperature_takes_the_most_probable(temperature: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature), 0, [0], 4)
    assert sampler.choose(torch.tensor([3.0, -50.0, 30.0, 0.0])) == 2


@pytest.mark.parametrize("temperature", [1e39, 1e300])
def test_any_temperature_leaves_what_a_constraint_takes_away(temperature: float) -> None:
    allowed = torch.tensor([True, False, True, False])
    drawn = {
        sampler(seed, temperature=temperature).choose(LOGITS[0], allowed) for seed in range(40)
    }
    assert drawn == {0, 2}


def test_a_constraint_to_tokens_of_no_probability_is_told() -> None:
    logits = torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf])
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="the model never says what may come next"):
            sampler(temperature=temperature).choose(
                logits, torch.tensor([True, False, False, True])
            )


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1e-320}, {"presence_penalty": -1e308}])
def test_a_penalty_that_leaves_no_numbers_is_refused(penalty: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be between"):
        SamplingOptions(**penalty)
