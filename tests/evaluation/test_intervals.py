"""Intervals against their definitions and scipy's."""

import numpy as np
import pytest
from scipy import stats

from lmops_jax.evaluation.intervals import (
  half_width_of_difference,
  mean_and_half_width,
  of_difference,
  of_proportion,
)


def test_half_width_is_that_of_the_t_test():
  values = [0.3, -0.1, 0.4, 0.25]
  mean, half = mean_and_half_width(values, 0.9)
  low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
  assert (mean - half, mean + half) == pytest.approx((low, high))
  assert mean == pytest.approx(np.mean(values))


def test_too_few_values_have_no_interval():
  assert mean_and_half_width([2.0]) == (2.0, None)
  assert mean_and_half_width([]) == (None, None)
  assert mean_and_half_width([1.0, None]) == (None, None)


def test_a_difference_of_two_groups_is_that_of_the_t_test():
  groups = [[0.3, -0.1, 0.4], [1.0, 1.1, 0.7]]
  low, high = stats.ttest_ind(*groups).confidence_interval(0.9)
  assert half_width_of_difference(groups, 0.9) == pytest.approx((high - low) / 2)
  assert half_width_of_difference([[1.0], [2.0]]) is None
  for wrong in ([[1.0], [1.0, 2.0]], []):
    with pytest.raises(ValueError, match="have no pooled deviation"):
      half_width_of_difference(wrong)


@pytest.mark.parametrize("successes,total", [(0, 10), (11, 50), (50, 50)])
def test_the_interval_of_a_proportion_is_scipys(successes, total):
  wanted = stats.binomtest(successes, total).proportion_ci(0.9, method="wilson")
  assert of_proportion(successes, total, 0.9) == pytest.approx(tuple(wanted), abs=1e-12)


@pytest.mark.parametrize("successes,total", [(3, 2), (-1, 5), (0, 0)])
def test_no_proportion(successes, total):
  with pytest.raises(ValueError, match=f"{successes} of {total} rows are no proportion"):
    of_proportion(successes, total)


def test_the_interval_of_a_paired_difference_is_scipys():
  rng = np.random.default_rng(0)
  hardness = rng.normal(0, 5, 40)
  first, second = hardness + rng.normal(0, 1, 40), hardness + rng.normal(0.7, 1, 40)
  found = of_difference(first, second, 0.9, num_resamples=2000, seed=3)
  wanted = stats.bootstrap(
    (second - first,), np.mean, confidence_level=0.9, n_resamples=2000, method="percentile",
    rng=np.random.default_rng(3)).confidence_interval
  assert (found.low, found.high) == pytest.approx(tuple(wanted), abs=1e-12)
  assert found.value == pytest.approx(np.mean(second - first))
  assert (found.num_rows, found.share_above) == (40, np.mean(second > first))
  # Drawn one by one the two means could not be told apart.
  apart = stats.bootstrap(
    (first, second), lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
    confidence_level=0.9, n_resamples=2000, method="percentile",
    rng=np.random.default_rng(3)).confidence_interval
  assert found.low > 0 and apart.low < 0


def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says():
  rng = np.random.default_rng(1)
  hits = 0
  for trial in range(200):
    first = rng.exponential(1, 50)
    found = of_difference(first, first + rng.normal(0.3, 1, 50), 0.8, 200, seed=trial)
    hits += found.low <= 0.3 <= found.high
  assert abs(hits / 200 - 0.8) < 0.09  # three standard errors


def test_rows_without_both_values_are_left_out():
  found = of_difference([1.0, np.nan, 3.0, 2.0], [2.0, 5.0, np.nan, 2.0])
  assert found.num_rows == 2 and found.value == 0.5 and found.share_above == 0.5
  assert of_difference([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0, 2, 0)
  for first, second, why in (([1.0], [1.0, 2.0], "same rows"), ([np.nan], [1.0], "no row")):
    with pytest.raises(ValueError, match=why):
      of_difference(first, second)
  with pytest.raises(ValueError, match="num_resamples=0"):
    of_difference([1.0], [2.0], num_resamples=0)
