"""The reward's terms against values by hand and loops over pictures."""

import numpy as np
import pytest

from lmops_jax.systems.promptist.rewards import Weights, finite, relevance, scores, terms


def test_relevance_has_its_knee_and_its_floor():
  cosine = [0.20, 0.28, 0.35, 0.0, -0.3, 1.0, 0.14]
  np.testing.assert_allclose(
    relevance(cosine), [-1.6, 0, 0, -5.6, -5.6, 0, -2.8], rtol=0, atol=1e-12)
  assert relevance(np.float32(cosine)).dtype == np.float64
  assert relevance(np.zeros((2, 3))).shape == (2, 3)


def test_the_knee_comes_before_the_mean():
  """The mean cosine of .18 and .38 is at the knee, yet one picture is off by 2."""
  found = terms(np.array([[0.18, 0.38]]), np.zeros((1, 2)))
  assert found.relevance[0] == pytest.approx(-1.0)


def test_scores_are_those_of_loops_over_pictures():
  rng = np.random.default_rng(0)
  cosine, aesthetic = rng.uniform(-0.1, 0.5, (5, 3)), rng.normal(5, 1, (5, 3))
  raw = rng.normal(5, 1, (5, 3))
  for relevance_weight, aesthetic_weight in ((1, 1), (0.5, 2), (0, 1)):
    want = []
    for p in range(5):
      baseline = sum(raw[p]) / 3
      want.append(sum(
        aesthetic_weight * (aesthetic[p, j] - baseline)
        + relevance_weight * min(20 * max(cosine[p, j], 0) - 5.6, 0) for j in range(3)) / 3)
    got = scores(
      terms(cosine, aesthetic), terms(cosine, raw).aesthetic,
      Weights(relevance_weight, aesthetic_weight))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_same_pictures_gain_nothing():
  cosine, aesthetic = np.full((2, 3), 0.3), np.array([[5.0, 6, 7], [1, 2, 3]])
  found = terms(cosine, aesthetic)
  np.testing.assert_array_equal(scores(found, found.aesthetic, Weights()), [0, 0])


def test_pictures_that_are_not_finite_are_left_out():
  cosine = np.array([[0.2, np.nan, 0.2], [np.nan] * 3, [0.3] * 3])
  aesthetic = np.array([[5.0, 9, np.inf], [1, 1, 1], [4, 5, 6]])
  np.testing.assert_array_equal(
    finite(cosine, aesthetic), [[True, False, False], [False] * 3, [True] * 3])
  found = terms(cosine, aesthetic)
  np.testing.assert_array_equal(found.num, [1, 0, 3])
  got = scores(found, np.array([4.0, 1, 5]), Weights())
  np.testing.assert_allclose(got, [1 - 1.6, np.nan, 0], atol=1e-12)
