"""How answers are chosen."""

import numpy as np

from lmops_jax.systems.metalm.evaluate import calibrated


def test_a_word_that_is_likely_everywhere_is_not_chosen_everywhere():
  """Against batch calibration in probabilities (arXiv:2309.17249, section 3.2)."""
  draws = np.random.default_rng(0)
  values = draws.normal(size=(40, 3)) + [0, 6, -6]  # nats
  assert set(values.argmax(axis=1)) == {1}
  shares = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
  expected = shares / shares.mean(axis=0)
  found = calibrated(values)
  np.testing.assert_allclose(
    np.exp(found - found[:, :1]), expected / expected[:, :1], rtol=1e-9)
  assert min(np.bincount(found.argmax(axis=1), minlength=3)) > 5
  # What rows have in common, and what all options of a row have in common, changes no choice.
  moved = calibrated(values + draws.normal(size=(40, 1)))
  np.testing.assert_allclose(moved, found)
