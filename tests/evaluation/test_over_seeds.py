"""Figures of several seeds, against hand-made numbers."""

import numpy as np
import pytest
from scipy import stats

from lmops_jax.evaluation import over_seeds


def test_shares_have_both_intervals():
  found = over_seeds.shares_of([(3, 10), (5, 10)])
  assert found["values"] == [0.3, 0.5] and found["mean"] == pytest.approx(0.4)
  assert found["num"] == 10
  # With two values the standard error is half their distance, and t has one degree of freedom.
  assert found["half_width"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.1)
  low, high = found["interval"]
  for end in (low, high):  # Wilson's ends are where the score test just rejects
    score = (0.4 - end) / np.sqrt(end * (1 - end) / 20)
    assert abs(score) == pytest.approx(stats.norm.ppf(0.975))
  assert over_seeds.share(found) == f"40.0 ({100 * low:.0f}–{100 * high:.0f})"


def test_one_seed_has_no_interval():
  assert over_seeds.spread(over_seeds.spread_of([1.5]), ".2f") == "1.50"
  assert over_seeds.spread(over_seeds.spread_of([1.0, 1.0]), ".1f") == "1.0 ± 0.0"
  assert over_seeds.spread(None, ".1f") == over_seeds.share(None) == "–"
