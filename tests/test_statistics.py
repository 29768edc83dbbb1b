"""Bootstraps against closed forms, and the properties that every interval must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meteora.study.statistics import (
    bootstrap_interval,
    corpus_interval,
    mean_over_tasks,
    paired_difference,
    paired_difference_over_tasks,
)

Z = 1.959964  # 97.5% quantile of the normal distribution
finite = st.floats(-1e6, 1e6)


def test_interval_of_a_mean_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=800)
    mean, low, high = bootstrap_interval(values, resamples=8000)
    half = Z * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_interval_of_a_share_is_the_binomial_one():
    values = [1.0] * 30 + [0.0] * 70
    mean, low, high = bootstrap_interval(values, resamples=8000)
    half = Z * math.sqrt(0.3 * 0.7 / 100)
    assert mean == 0.3
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.015)


def test_confidence_and_number_of_samples_set_the_width():
    def width(n, confidence=0.95):
        _, low, high = bootstrap_interval([0.0, 1.0] * (n // 2), confidence=confidence)
        return high - low

    assert width(400) == pytest.approx(width(100) / 2, rel=0.15)
    assert width(100, 0.5) == pytest.approx(width(100) * 0.6745 / Z, rel=0.15)


def test_equal_seeds_agree_and_others_differ():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=1, max_size=30))
def test_interval_holds_the_mean_of_draws_within_the_data(values):
    mean, low, high = bootstrap_interval(values, resamples=200)
    margin = 1e-6 * (1 + max(map(abs, values)))
    assert min(values) - margin <= low <= high <= max(values) + margin
    assert mean == pytest.approx(np.mean(values), abs=margin)


def test_equal_values_give_a_point():
    assert bootstrap_interval([0.25] * 8) == (0.25, 0.25, 0.25)


def test_pairing_removes_what_both_methods_share():
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 10, size=200)
    better, worse = difficulty + 0.5 + rng.normal(0, 0.1, 200), difficulty
    difference, low, high = paired_difference(better, worse)
    half = Z * (better - worse).std() / math.sqrt(200)
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.1 * half)
    assert 0.4 < low < difference < high < 0.6
    # Taken apart, the two means could not be told from each other.
    assert bootstrap_interval(better)[1] < bootstrap_interval(worse)[2]


def test_mean_over_tasks_counts_tasks_and_not_samples():
    values = {"large": [1.0] * 900, "small": [0.0] * 10}
    assert mean_over_tasks(values) == (0.5, 0.5, 0.5)


def test_mean_over_tasks_has_the_stratified_error():
    values = {"a": [1.0, 0.0] * 50, "b": [1.0, 0.0, 0.0, 0.0] * 10, "c": [1.0] * 20}
    mean, low, high = mean_over_tasks(values, resamples=8000)
    half = Z * math.sqrt(0.25 / 100 + 0.1875 / 40) / 3
    assert mean == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_mean_over_tasks_does_not_depend_on_the_order_of_tasks():
    values = {"a": [1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0]}
    assert mean_over_tasks(values) == mean_over_tasks(dict(reversed(values.items())))


def test_paired_difference_over_tasks():
    first = {"a": [1.0, 1.0, 0.0, 1.0], "b": [1.0, 0.0]}
    second = {"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0, 0.0]}
    difference, low, high = paired_difference_over_tasks(first, second)
    assert difference == pytest.approx(0.25)
    assert 0.0 <= low <= difference <= high <= 0.5


def test_corpus_interval_of_a_mean_is_the_bootstrap_of_that_mean():
    values = np.random.default_rng(5).normal(size=60)
    value, low, high = corpus_interval(lambda drawn: values[drawn].mean(), 60, resamples=4000)
    _, expected_low, expected_high = bootstrap_interval(values, resamples=4000, seed=9)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected_low, expected_high), abs=0.02)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="3 and 2 samples cannot be paired"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="winowhy is on one side only"):
        paired_difference_over_tasks({"winowhy": [1.0]}, {})
    with pytest.raises(ValueError, match="no task"):
        mean_over_tasks({})
    with pytest.raises(ValueError, match="at least one sample"):
        corpus_interval(lambda drawn: 0.0, 0)
