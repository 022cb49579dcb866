"""The layered and the folded form against float64, and what is refused."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from lmops_jax.models import aesthetic

WIDTH, HIDDEN = 6, (5, 4, 3, 2)


@pytest.fixture(scope="module")
def params():
  module = aesthetic.AestheticPredictor(HIDDEN)
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, WIDTH))))["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def unit_vectors(num, width):
  x = np.random.default_rng(1).normal(size=(num, width))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_both_forms_are_the_same_affine_map(params):
  features = np.concatenate([unit_vectors(7, WIDTH), np.zeros((1, WIDTH), np.float32)])
  want = features.astype(np.float64)
  for name in aesthetic.LAYERS:  # layer by layer in float64
    want = want @ np.asarray(params[name]["kernel"], np.float64) + params[name]["bias"]
  folded = aesthetic.fold(params)
  layered = aesthetic.AestheticPredictor(HIDDEN).apply({"params": params}, features)
  assert np.ptp(want) > 1
  for got in (layered, aesthetic.rate(folded, features)):
    assert got.shape == (8,) and got.dtype == np.float32
    np.testing.assert_allclose(got, want[:, 0], rtol=1e-6, atol=1e-6 * np.abs(want).max())
  assert aesthetic.rate(folded, features)[-1] == folded.bias


def test_vectors_of_another_width_or_length_are_refused(params):
  with pytest.raises(ValueError, match="have 7 numbers and the aesthetic predictor takes 6"):
    aesthetic.rate(aesthetic.fold(params), unit_vectors(2, 7))
  good = unit_vectors(3, WIDTH)
  aesthetic.check_unit(np.concatenate([good, np.zeros((1, WIDTH))]))
  aesthetic.check_unit(good * 1.0005)
  for wrong in (2.0, 0.99, np.nan):
    with pytest.raises(ValueError, match="vector 1 of the pictures has length"):
      aesthetic.check_unit(good * np.array([[1], [wrong], [1]]))
