"""The perceptron and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.perceptron import Perceptron, PerceptronConfig
from lmops_jax.training.losses import binary_example_losses


def test_initialisation_and_loss():
  model = Perceptron(PerceptronConfig(64))
  x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
  params = model.init(jax.random.key(0), x)["params"]
  theta = np.asarray(params["theta"], np.float64)
  assert theta.shape == (64,) and np.abs(theta).max() <= 1 / 8 and np.abs(theta).max() > 0.1
  labels = np.array([0, 1, 1, 0, 1], np.float32)
  chance = 1 / (1 + np.exp(-x.astype(np.float64) @ theta))
  want = -(labels * np.log(chance) + (1 - labels) * np.log(1 - chance))
  losses = binary_example_losses(model)
  np.testing.assert_allclose(losses(params, {"inputs": x, "labels": labels}), want, rtol=1e-5)
  far = {"theta": jnp.full(64, 1e4)}  # no overflow
  assert np.isfinite(np.asarray(losses(far, {"inputs": x, "labels": labels}))).all()
  with pytest.raises(ValueError, match="the label of row 2 is 0.5"):
    losses.check_batch({"inputs": x[:3], "labels": np.array([0, 1, 0.5])})


def test_a_dim_below_one_is_refused():
  with pytest.raises(ValueError, match="dim=0"):
    PerceptronConfig(0)
