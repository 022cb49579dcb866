"""Noise schedules: published values, and pictures and noises out of what networks say."""

import numpy as np
import pytest

from lmops_jax.models.diffusion.noise import (
  PREDICTIONS,
  NoiseSchedule,
  clean_and_noise,
  noised,
  target,
)


def test_stable_diffusion_has_its_published_values():
  schedule = NoiseSchedule()
  np.testing.assert_allclose(schedule.signal[[0, 999]], [0.99914998, 0.00466010], atol=5e-9)
  np.testing.assert_allclose(schedule.lambdas[[0, 999]], [3.5346992, -2.6820242], atol=3e-7)


def test_variances_are_what_their_kind_says():
  linear = NoiseSchedule(1e-4, 0.02, "linear", 11)
  betas = 1 - linear.signal[1:] / linear.signal[:-1]
  np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 10, rtol=1e-3)
  scaled = NoiseSchedule(1e-4, 0.02, "scaled_linear", 11)
  betas = 1 - scaled.signal[1:] / scaled.signal[:-1]
  np.testing.assert_allclose(np.diff(np.sqrt(betas)), (0.02**0.5 - 0.01) / 10, rtol=1e-3)
  np.testing.assert_allclose(linear.alphas**2 + linear.sigmas**2, 1, rtol=1e-14)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_perfect_network_says_gives_picture_and_noise_back(prediction):
  clean, noise = np.random.default_rng(0).normal(size=(2, 3, 5))
  alpha, sigma = 0.6, 0.8
  x = noised(clean, noise, alpha, sigma)
  output = target(prediction, clean, noise, alpha, sigma)
  found = clean_and_noise(prediction, x, output, alpha, sigma)
  np.testing.assert_allclose(found[0], clean, rtol=1e-12)
  np.testing.assert_allclose(found[1], noise, rtol=1e-12)


@pytest.mark.parametrize("fields, message", [
  ({"beta_end": 1e-4}, "beta_end=0.0001 is less than beta_start=0.00085"),
  ({"kind": "cosine"}, "models.NoiseSchedule.kind='cosine'"),
  ({"prediction": "sample"}, "models.NoiseSchedule.prediction='sample'"),
  ({"beta_end": 1.0}, "models.NoiseSchedule.beta_end=1.0"),
])
def test_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    NoiseSchedule(**fields)
