"""Scaling-law fits recover known constants, resist outliers, and refuse too little data."""

import numpy as np
import pytest

from lmops_jax.evaluation import scaling

# Hoffmann et al.'s published fit.
TRUE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
SIZES = (162_417_408, 468_239_360, 1_004_348_928, 1_741_785_088)
FAR = [(175e9, 300e9), (6.7e9, 1e12), (70e9, 2e12), (405e9, 15e12)]


def _law(n, d):
  return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def _grid():
  n = np.repeat(np.array(SIZES, float), 12)
  d = np.tile(np.linspace(4e9, 52e9, 12), len(SIZES))
  return n, d


def test_recovers_known_constants():
  n, d = _grid()
  fit = scaling.fit_scaling_law(n, d, _law(n, d))
  for name, value in TRUE.items():
    assert getattr(fit, name) == pytest.approx(value, rel=1e-4), name
  assert np.abs(fit.residuals).max() < 1e-9


@pytest.mark.parametrize("seed", range(2))
def test_predictions_within_two_per_cent_under_noise(seed):
  n, d = _grid()
  noise = np.random.default_rng(seed).normal(size=n.size) * 1e-3
  fit = scaling.fit_scaling_law(n, d, _law(n, d) * np.exp(noise))
  for far in FAR:
    assert fit.predict(*far) == pytest.approx(_law(*far), rel=0.02)


def test_other_units_and_constants():
  # Small models, small data, a large irreducible loss.
  n, d = np.meshgrid([1e5, 3e5, 1e6, 3e6], [1e6, 1e7, 1e8])
  n, d = n.ravel(), d.ravel()
  losses = 3.1 + 30 / n**0.25 + 8 / d**0.12
  fit = scaling.fit_scaling_law(n, d, losses)
  np.testing.assert_allclose(fit.predict(1e7, 1e9), 3.1 + 30 / 1e7**0.25 + 8 / 1e9**0.12, rtol=1e-3)


def test_outliers_hardly_move_the_fit():
  n, d = _grid()
  losses = _law(n, d)
  losses[[5, 20, 33]] *= 1.2
  fit = scaling.fit_scaling_law(n, d, losses)
  assert fit.predict(70e9, 2e12) == pytest.approx(_law(70e9, 2e12), rel=5e-3)
  assert set(np.argsort(-np.abs(fit.residuals))[:3]) == {5, 20, 33}


def test_gradient_of_the_objective():
  rng = np.random.default_rng(0)
  data = (rng.normal(size=8), rng.normal(size=8), rng.normal(size=8))
  theta = np.array([0.1, -0.3, 0.2, 0.4, 0.6])
  for delta in (0.05, 10.0):
    _, gradient = scaling._objective(theta, data, delta)
    for i in range(5):
      step = np.zeros(5)
      step[i] = 1e-6
      up, down = (scaling._objective(theta + s, data, delta)[0] for s in (step, -step))
      assert gradient[i] == pytest.approx((up - down) / 2e-6, rel=1e-5)


def test_bootstrap_intervals_cover_the_truth_and_are_reproducible():
  n, d = _grid()
  noise = np.random.default_rng(1).normal(size=n.size) * 2e-3
  losses = _law(n, d) * np.exp(noise)
  fit = scaling.fit_scaling_law(n, d, losses, num_bootstrap=20, seed=7)
  assert fit.samples.shape == (20, 5)
  low, high = fit.interval(1e9, 3e10)
  assert low < _law(1e9, 3e10) < high and high - low < 0.02
  assert fit.interval(np.array([1e9, 2e9]), 1e12).shape == (2, 2)
  value, low, high = fit.constants()["alpha"]
  assert low <= value <= high
  again = scaling.fit_scaling_law(n, d, losses, num_bootstrap=2, seed=7)
  np.testing.assert_array_equal(again.samples, fit.samples[:2])


def test_without_bootstrap_intervals_are_unknown():
  n, d = _grid()
  fit = scaling.fit_scaling_law(n, d, _law(n, d))
  assert np.isnan(fit.interval(1e9, 1e10)).all()
  assert np.isnan(fit.constants()["E"][1:]).all()


@pytest.mark.parametrize(
  "n, d, losses, message",
  [
    ([1e6] * 4, [1e6] * 4, [3.0] * 4, "cannot be fitted to 4 points"),
    ([1e6] * 6, [1, 2, 3, 4, 5, 6], [3.0] * 6, "values of the model size, but there are 1"),
    ([1, 2, 3, 4, 5], [1, 1, 2, 2, 1], [3.0] * 5, "different values of the token count"),
    ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [3, 3, np.nan, 3, 3], "loss of point 2 is nan"),
    ([1, 2, 0, 4, 5], [1, 2, 3, 4, 5], [3.0] * 5, "model size of point 2 is 0.0"),
    ([1, 2, 3, 4, 5], [1, 2, 3, 4], [3.0] * 5, "one length"),
  ],
)
def test_refuses_what_does_not_determine_the_law(n, d, losses, message):
  with pytest.raises(ValueError, match=message):
    scaling.fit_scaling_law(n, d, losses)
