"""The sequence regressor against NumPy, and starting it from a language model."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.heads import SequenceRegressor, pool, regressor_params
from lmops_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
  vocab_size=30, num_layers=1, width=8, num_heads=2, mlp_width=12, max_length=16
)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)


def _params(model, seed, *args):
  args = args or (jnp.zeros((1, 6), jnp.int32),)
  return nn.unbox(jax.jit(model.init)(jax.random.key(seed), *args)["params"])


def _pool_loop(hidden, mask, pooling):
  rows = []
  for states, real in zip(hidden, mask, strict=True):
    positions = [i for i, m in enumerate(real) if m]
    if pooling == "mean":
      rows.append(sum(states[i] for i in positions) / len(positions))
    else:
      rows.append(states[positions[-1] if pooling == "last" else positions[0]])
  return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pooling_equals_a_loop_and_ignores_padding(pooling):
  hidden = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
  want = _pool_loop(hidden, MASK, pooling)
  np.testing.assert_allclose(pool(hidden, MASK, pooling), want, rtol=1e-5, atol=1e-6)
  spoiled = np.where(MASK[:, :, None] == 1, hidden, np.nan)
  np.testing.assert_allclose(pool(spoiled, MASK, pooling), want, rtol=1e-5, atol=1e-6)


def test_regressor_is_the_pooled_trunk_times_the_head():
  model = SequenceRegressor(CONFIG)
  tokens = np.random.default_rng(1).integers(0, 30, (3, 6)).astype(np.int32)
  params = _params(model, 0, tokens, MASK)
  params["head"]["bias"] = jnp.asarray(0.7)
  trunk = Transformer(CONFIG, with_unembedding=False)
  hidden = jax.jit(trunk.apply)({"params": params["trunk"]}, tokens)
  want = _pool_loop(np.asarray(hidden), MASK, "mean") @ np.asarray(params["head"]["kernel"]) + 0.7
  got = jax.jit(model.apply)({"params": params}, tokens, MASK)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_tokens_behind_the_mask_and_more_padding_change_nothing():
  model = SequenceRegressor(CONFIG)
  tokens = np.random.default_rng(2).integers(0, 30, (3, 6)).astype(np.int32)
  params = _params(model, 0, tokens, MASK)
  want = jax.jit(model.apply)({"params": params}, tokens, MASK)
  padded = np.pad(np.where(MASK == 1, tokens, 29), ((0, 0), (0, 5)), constant_values=7)
  got = jax.jit(model.apply)({"params": params}, padded, np.pad(MASK, ((0, 0), (0, 5))))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_regressor_starts_from_a_language_model(tied):
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  lm = _params(Transformer(config), 1)
  model = SequenceRegressor(config)
  params = regressor_params(model, jax.random.key(2), lm)
  fresh = nn.unbox(jax.eval_shape(model.init, jax.random.key(3), MASK, MASK))["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
  assert "unembedding" not in params["trunk"]
  np.testing.assert_array_equal(params["trunk"]["embedding"], lm["embedding"])
  assert np.std(params["head"]["kernel"]) > 0 and params["head"]["bias"] == 0


def test_regressor_from_another_size_is_refused():
  other = dataclasses.replace(CONFIG, width=12)
  lm = _params(Transformer(other), 1)
  with pytest.raises(ValueError, match=r"'embedding'\] of shape \(30, 8\) .*\(30, 12\)"):
    regressor_params(SequenceRegressor(CONFIG), jax.random.key(2), lm)


def test_unknown_pooling_is_refused():
  with pytest.raises(ValueError, match="pooling='max' is not one of mean, last, first"):
    SequenceRegressor(CONFIG, pooling="max").init(jax.random.key(0), MASK, MASK)
