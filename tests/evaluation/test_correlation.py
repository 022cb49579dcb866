"""Rank correlation and top-fraction agreement against brute force and scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lmops_jax.evaluation import correlation


def _kendall_free_ranks(values):
  """Average ranks from pairwise comparisons alone."""
  values = np.asarray(values)
  less = (values[None, :] < values[:, None]).sum(1)
  equal = (values[None, :] == values[:, None]).sum(1)
  return less + (equal + 1) / 2


@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_spearman_with_ties_equals_pearson_of_average_ranks(num_levels):
  rng = np.random.default_rng(num_levels)
  x = rng.integers(num_levels, size=60)
  y = x + rng.integers(num_levels, size=60)
  want = np.corrcoef(_kendall_free_ranks(x), _kendall_free_ranks(y))[0, 1]
  assert correlation.spearman(x, y) == pytest.approx(want, abs=1e-12)
  assert correlation.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_of_monotone_maps_is_exactly_one():
  x = np.random.default_rng(0).normal(size=101)
  assert correlation.spearman(x, np.exp(x)) == pytest.approx(1.0, abs=1e-15)
  assert correlation.spearman(x, -(x**3)) == pytest.approx(-1.0, abs=1e-15)


def test_spearman_by_hand():
  # Ranks 1,2,3,4 against 2,1,4,3: 1 - 6 * 4 / (4 * 15) = 0.6.
  assert correlation.spearman([0.1, 0.2, 0.3, 0.4], [7, 5, 11, 9]) == pytest.approx(0.6)


@pytest.mark.parametrize(
  "predicted, actual, message",
  [
    ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "all 3 predicted scores equal 1.0"),
    ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "all 3 actual scores equal 0.0"),
    ([1.0, 2.0], [1.0, 2.0, 3.0], "one length"),
    ([[1.0, 2.0]], [[1.0, 2.0]], "one length"),
    ([1.0], [1.0], "at least 2"),
    ([1.0, np.nan, 2.0], [1.0, 2.0, 3.0], "nan at position 1"),
    ([1.0, 2.0, 3.0], [1.0, 2.0, np.inf], "inf at position 2"),
  ],
)
def test_spearman_refuses_what_has_no_correlation(predicted, actual, message):
  with pytest.raises(ValueError, match=message):
    correlation.spearman(predicted, actual)


def test_top_fraction_metrics_by_hand():
  actual = np.arange(10.0)  # top 3: 7, 8, 9
  predicted = np.array([0, 0, 0, 0, 0, 9.0, 0, 8.0, 7.0, 0])  # top 3: 5, 7, 8
  got = correlation.top_fraction_metrics(predicted, actual, fraction=0.3)
  assert got["f1"] == pytest.approx(2 / 3)
  assert got["accuracy"] == pytest.approx(8 / 10)  # wrong on 5 and 9


def test_top_fraction_chance_is_the_mean_over_all_random_sets():
  n, k = 7, 2
  actual = np.arange(n, dtype=float)
  rows = []
  for chosen in itertools.combinations(range(n), k):
    predicted = np.zeros(n)
    predicted[list(chosen)] = 1
    rows.append(correlation.top_fraction_metrics(predicted, actual, fraction=k / n))
  for name in ("accuracy", "f1"):
    assert rows[0][f"random_{name}"] == pytest.approx(np.mean([row[name] for row in rows]))


def test_top_fraction_refuses_a_fraction_outside_its_range():
  with pytest.raises(ValueError, match="fraction=1.5"):
    correlation.top_fraction_metrics([1, 2], [1, 2], fraction=1.5)
