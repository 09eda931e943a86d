"""Intervals and tests against scipy where it is at hand, and against numbers made by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from ossature.eval.statistics import bootstrap, mean, pass_at, sign_test, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 10), (10, 10), (481, 1000), (1, 2)])
def test_wilson_is_scipys(right, count):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    found = wilson(right, count)
    assert found.value == right / count
    assert found[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 5), (1, 6), (30, 12), (0, 9), (3, 4)])
def test_the_sign_test_is_scipys(wins, losses):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, abs=1e-12)


def test_six_of_six_by_hand():
    assert sign_test(6, 0) == sign_test(0, 6) == 2 / 64


def test_pass_at_k_is_the_share_of_drawn_sets_with_a_right_one():
    answers = [True, False, False, True, False]
    for k in range(1, 6):
        sets = list(combinations(answers, k))
        expected = sum(any(drawn) for drawn in sets) / len(sets)
        assert pass_at(k, 5, 2) == pytest.approx(expected)
    with pytest.raises(ValueError, match="pass@6 needs at least 6 samples, not 5"):
        pass_at(6, 5, 2)


def test_a_bootstraps_interval_is_that_of_the_normal_for_many_values():
    values = np.random.default_rng(1).normal(3, 2, 4000).tolist()
    found = bootstrap(values)
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found.value == pytest.approx(np.mean(values))
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert bootstrap(values) == found


def test_one_value_alone_has_no_interval_and_one_answer_has_a_wide_one():
    value, low, high = bootstrap([2.5])
    assert value == 2.5 and math.isnan(low) and math.isnan(high)
    assert mean([1.0]).low == pytest.approx(0.2065, abs=1e-4)


def test_weights_count():
    assert bootstrap([1.0, 4.0], [3.0, 1.0]).value == 1.75
    assert mean([0.0, 1.0, 1.0, 1.0]) == wilson(3, 4)
    assert mean([0.0, 1.0], [3.0, 1.0]).value == 0.25  # no share: they weigh differently
