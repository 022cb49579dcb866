"""Similarity and exclusion against plain loops, and the cases without an answer."""

import jax
import numpy as np
import pytest

from lmops_jax.evaluation import contributions


def _policy(num_steps=5, num_examples=8):
  """Sparse weights and contributions of both signs."""
  rng = np.random.default_rng(0)
  weights = rng.dirichlet(np.ones(num_examples), size=num_steps)
  weights[rng.random(weights.shape) < 0.4] = 0
  weights /= weights.sum(1, keepdims=True)
  return np.float32(weights), np.float32(rng.normal(size=weights.shape))


def test_similarity_counts_only_examples_with_weight():
  weights, values = _policy()
  found = jax.jit(jax.vmap(contributions.similarity))(weights, values)
  series = contributions.series(found)
  assert (weights == 0).any()
  for t in range(5):
    active = [n for n in range(8) if weights[t, n] != 0]
    assert len(active) >= 2
    mean = sum(float(weights[t, n]) * float(values[t, n]) for n in active)
    square = sum((float(values[t, n]) - mean) ** 2 for n in active)
    deviation = (square / (len(active) - 1)) ** 0.5
    assert found.num_active[t] == len(active)
    assert found.mean[t] == pytest.approx(mean, abs=1e-6)
    assert found.deviation[t] == pytest.approx(deviation, rel=1e-6)
    assert series[t] == pytest.approx(mean / deviation, abs=1e-5)
  mean, left_out = contributions.mean_similarity(found)
  assert mean == pytest.approx(series.mean()) and left_out == 0


def test_similarity_of_plain_numbers():
  found = contributions.similarity(np.float32([0.5, 0.5, 0]), np.float32([1, 3, 99]))
  assert (float(found.mean), int(found.num_active)) == (2, 2)
  assert float(found.deviation) == pytest.approx(2**0.5)  # (1 + 1) / (2 - 1)
  # Centred on the weighted mean, with squares that are not weighted.
  found = contributions.similarity(np.float32([0.75, 0.25]), np.float32([0, 4]))
  assert float(found.mean) == 1
  assert float(found.deviation) == pytest.approx((1 + 9) ** 0.5)


def test_steps_without_a_spread_are_infinite_and_left_out_of_the_mean():
  weights = np.float32([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]])
  values = np.float32([[2, 1, 0], [3, 3, 0], [1, 3, 0]])
  found = jax.vmap(contributions.similarity)(weights, values)
  series = contributions.series(found)
  np.testing.assert_array_equal(series[:2], np.inf)
  mean, left_out = contributions.mean_similarity(found)
  assert left_out == 2
  assert mean == pytest.approx(2**0.5)
  alone = jax.vmap(contributions.similarity)(weights[:2], values[:2])
  assert contributions.mean_similarity(alone) == (None, 2)


def test_excluded_are_those_without_weight_among_those_that_do_not_help():
  weights, values = _policy()
  values[0, 0] = 0  # CT = 0 does not help
  found = jax.vmap(contributions.exclusion)(weights, values)
  pairs = [(t, n) for t in range(5) for n in range(8) if values[t, n] <= 0]
  excluded = [pair for pair in pairs if weights[pair] == 0]
  assert 0 < len(excluded) < len(pairs)
  assert (found.num_harmful.sum(), found.num_excluded.sum()) == (len(pairs), len(excluded))
  assert contributions.excluded_share(found) == pytest.approx(len(excluded) / len(pairs))
  mask = np.arange(8) < 6
  masked = jax.vmap(contributions.exclusion, (0, 0, None))(weights, values, mask)
  fewer = jax.vmap(contributions.exclusion)(weights[:, :6], values[:, :6])
  assert contributions.excluded_share(masked) == contributions.excluded_share(fewer)


def test_counts_beyond_float32_are_exact():
  found = contributions.Exclusion(
    np.full(3, 2**24 + 1, np.int32), jax.numpy.full(3, 2**23 + 1, np.int32))
  assert contributions.excluded_share(found) == (2**23 + 1) / (2**24 + 1)


def test_nothing_harmful_has_no_excluded_share():
  found = jax.vmap(contributions.exclusion)(*np.float32([[[0.5, 0.5]], [[1, 2]]]))
  assert contributions.excluded_share(found) is None
  conventional = jax.vmap(contributions.exclusion)(*np.float32([[[0.5, 0.5]], [[-1, 2]]]))
  assert contributions.excluded_share(conventional) == 0


def test_learned_examples_by_their_share_of_the_largest_weight():
  # Shares of the largest weight: 0, 0.125, 0.25, 0.5, 1, and one that is not learned.
  weights = np.float32([0, 0.0625, 0.125, 0.25, 0.5, 0.0625])
  losses = np.float32([0, 1e-7, 9e-7, 0, 0, 1e-5])
  histogram = contributions.learned_histogram(weights, losses)
  want = np.zeros(contributions.NUM_BINS, int)
  want[[0, 2, 5, 10, 19]] = 1
  np.testing.assert_array_equal(histogram, want)
  assert contributions.learned_share_below(histogram) == pytest.approx(2 / 5)
  assert contributions.learned_share_below(histogram, 0.25) == pytest.approx(2 / 5)  # not 0.25
  assert contributions.learned_share_below(histogram, 0.3) == pytest.approx(3 / 5)
  assert contributions.learned_share_below(histogram, 1.0) == 1
  twice = contributions.learned_share_below(np.stack([histogram, histogram]))
  assert twice == contributions.learned_share_below(histogram)


def test_rows_that_are_no_examples_are_not_learned():
  weights, losses = np.float32([0.5, 0.5, 0, 0]), np.float32([0, 1, 0, 0])
  mask = np.array([True, True, False, False])
  histogram = contributions.learned_histogram(weights, losses, mask)
  want = contributions.learned_histogram(weights[:2], losses[:2])
  np.testing.assert_array_equal(histogram, want)
  assert contributions.learned_share_below(histogram) == 0


def test_learned_share_of_none_and_between_bins():
  assert contributions.learned_share_below(np.zeros(contributions.NUM_BINS)) is None
  with pytest.raises(ValueError, match="threshold=0.23 is not a multiple of 1/20"):
    contributions.learned_share_below(np.ones(contributions.NUM_BINS), 0.23)
