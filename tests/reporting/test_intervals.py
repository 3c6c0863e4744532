"""Intervals against closed forms and coverage."""

import numpy as np
import pytest

from jaxft.reporting.intervals import paired_difference, proportion, ratio


def test_wilson_interval_equals_published_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    estimate = proportion(81, 263)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    assert round(proportion(0, 20).high, 4) == 0.1611
    assert proportion(20, 20).high == pytest.approx(1.0)
    unknown = proportion(0, 0)
    assert np.isnan([unknown.value, unknown.low, unknown.high]).all() and unknown.count == 0


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    estimate = ratio(values, np.ones(4000))
    half = 1.96 * values.std() / np.sqrt(4000)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_ratio_weighs_rows_by_their_tokens():
    assert ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0])).value == pytest.approx(2.5)


def test_pairing_removes_what_both_models_share():
    generator = np.random.default_rng(2)
    hard, tokens = generator.normal(5, 2, 300), np.ones(300)
    a, b = hard, hard - 0.1 + generator.normal(0, 0.01, 300)
    difference = paired_difference((a, tokens), (b, tokens))
    assert difference.value == pytest.approx((b - a).mean())
    assert difference.high < -0.09 and difference.low > -0.11
    alone = ratio(b, tokens)
    assert alone.high - alone.low > 10 * (difference.high - difference.low)


def test_one_row_says_nothing_of_its_spread():
    estimate = ratio(np.array([2.0]), np.array([1.0]))
    assert estimate.value == 2.0 and np.isnan(estimate.low) and np.isnan(estimate.high)


def test_two_rows_have_a_spread():
    estimate = ratio(np.array([1.0, 3.0]), np.ones(2))
    assert (estimate.value, estimate.low, estimate.high) == (2.0, 1.0, 3.0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_without_trained_tokens_have_no_ratio_and_no_interval():
    estimate = ratio(np.zeros(3), np.zeros(3))
    assert np.isnan([estimate.value, estimate.low, estimate.high]).all()


def test_estimates_do_not_change_between_calls():
    values = np.arange(50.0)
    assert ratio(values, values + 1) == ratio(values, values + 1)
