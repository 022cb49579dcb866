"""The t interval over seeds against its definition."""

import numpy as np
import pytest
from scipy import stats

from lmops_jax.evaluation.intervals import mean_and_half_width, of_proportion


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


@pytest.mark.parametrize("successes,total", [(0, 10), (11, 50), (50, 50)])
def test_the_interval_of_a_proportion_is_scipys(successes, total):
  wanted = stats.binomtest(successes, total).proportion_ci(0.9, method="wilson")
  assert of_proportion(successes, total, 0.9) == pytest.approx(tuple(wanted), abs=1e-12)


@pytest.mark.parametrize("successes,total", [(3, 2), (-1, 5), (0, 0)])
def test_no_proportion(successes, total):
  with pytest.raises(ValueError, match=f"{successes} of {total} rows are no proportion"):
    of_proportion(successes, total)
