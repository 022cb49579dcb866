"""Connectors against their formulas, their initial values, and dropout in the resampler."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.connectors import (
  ConnectorConfig,
  FeedForwardConnectorConfig,
  LinearConnectorConfig,
  ResamplerConfig,
)
from lmops_jax.models.transformer import TransformerConfig

TEXT = TransformerConfig(vocab_size=9, width=16, num_heads=4)
FEATURES = np.random.default_rng(0).normal(size=(3, 7, 10)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(5), 3)


@functools.cache
def _params(config, text=TEXT, width=10):
  module = config.module(text, width)
  features = jnp.zeros((1, 7, width))
  return nn.unbox(jax.jit(module.init)(jax.random.key(0), features)["params"])


def _apply(config, params, features=FEATURES, keys=None, text=TEXT):
  module = config.module(text, features.shape[-1])
  return jax.jit(lambda p, x, k: module.apply({"params": p}, x, k))(params, features, keys)


def _product(x, p):
  kernel = np.asarray(p["kernel"], np.float64)
  return x @ kernel.reshape(x.shape[-1], -1) + np.asarray(p["bias"], np.float64).reshape(-1)


def _with_biases(params):
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)


@pytest.mark.parametrize("num_heads", [None, 2])
def test_the_resampler_equals_its_formula(num_heads):
  """Queries are the latents; keys and values are the image's vectors, then the latents."""
  config = ResamplerConfig(num_latents=5, num_heads=num_heads)
  params = _with_biases(_params(config))
  heads, latents = num_heads or 4, np.asarray(params["latents"], np.float64)
  want = []
  for features in FEATURES.astype(np.float64):
    seen = np.concatenate([_product(features, params["dense"]), latents])
    q = _product(latents, params["query"]).reshape(5, heads, -1)
    k, v = (_product(seen, params[name]).reshape(12, heads, -1) for name in ("key", "value"))
    scores = np.einsum("she,mhe->hsm", q, k) / math.sqrt(16 / heads)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    out = np.einsum("hsm,mhe->she", weights, v).reshape(5, 16)
    want.append(_product(out, params["out"]))
  np.testing.assert_allclose(_apply(config, params), want, rtol=1e-4, atol=1e-5)


def test_linear_and_feed_forward_equal_their_formulas():
  linear = LinearConnectorConfig()
  params = _with_biases(_params(linear))
  np.testing.assert_allclose(
    _apply(linear, params), _product(FEATURES, params["dense"]), rtol=1e-4, atol=1e-5)
  config = FeedForwardConnectorConfig(num_layers=3, hidden=12, activation="relu")
  params = _with_biases(_params(config))
  x = np.maximum(_product(FEATURES, params["dense_0"]), 0)
  x = np.maximum(_product(x, params["dense_1"]), 0)
  np.testing.assert_allclose(
    _apply(config, params), _product(x, params["dense_2"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, num_vectors", [
  (ResamplerConfig(num_latents=5), 5), (LinearConnectorConfig(), 7),
  (FeedForwardConnectorConfig(), 7)])
def test_connectors_are_plug_ins(config, num_vectors):
  assert isinstance(config, ConnectorConfig)
  assert config.num_vectors(7) == num_vectors
  wide = dataclasses.replace(TEXT, embedding_width=24, dtype="bfloat16")
  out = jax.eval_shape(lambda: config.module(wide, 10).init_with_output(
    jax.random.key(0), jnp.asarray(FEATURES, jnp.bfloat16))[0])
  assert out.shape == (3, num_vectors, 24) and out.dtype == jnp.bfloat16


def test_initial_values_are_the_published_ones():
  text = dataclasses.replace(TEXT, width=128)
  params = _params(ResamplerConfig(num_latents=64), text, 96)
  assert np.std(params["dense"]["kernel"]) == pytest.approx((3 * 96) ** -0.5, rel=0.02)
  assert np.abs(params["dense"]["kernel"]).max() <= 96**-0.5
  assert np.std(params["latents"]) == pytest.approx(1, rel=0.03)
  xavier = math.sqrt(2 / 256)
  for name in ("query", "key", "value"):
    assert np.std(params[name]["kernel"]) == pytest.approx(xavier / math.sqrt(2), rel=0.02)
  assert np.std(params["out"]["kernel"]) == pytest.approx(xavier, rel=0.02)


@pytest.mark.parametrize("kind", [ResamplerConfig, LinearConnectorConfig])
@pytest.mark.parametrize("unit_scale, deviation", [(True, 1), (False, 768**-0.5 / math.sqrt(3))])
def test_vectors_of_length_one_start_at_unit_scale_if_asked(kind, unit_scale, deviation):
  features = np.random.default_rng(2).normal(size=(50, 768))
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  params = _params(kind(unit_scale=unit_scale), dataclasses.replace(TEXT, width=256), 768)
  assert np.std(features @ params["dense"]["kernel"]) == pytest.approx(deviation, rel=0.05)


def test_the_resampler_drops_by_the_keys_of_images():
  config = ResamplerConfig(num_latents=5, dropout=0.5)
  params = _with_biases(_params(config))
  plain = _apply(ResamplerConfig(num_latents=5), params, keys=KEYS)
  np.testing.assert_array_equal(_apply(config, params), plain)
  got = _apply(config, params, keys=KEYS)
  assert np.abs(got - plain).max() > 0.05
  np.testing.assert_allclose(
    _apply(config, params, FEATURES[1:2], KEYS[1:2]), got[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make, message", [
  (lambda: ResamplerConfig(num_heads=3).module(TEXT, 10),
   "num_heads=3 must divide the width of word embeddings, 16"),
  (lambda: ResamplerConfig(num_latents=0), "num_latents=0 must be"),
  (lambda: FeedForwardConnectorConfig(num_layers=1), "num_layers=1 must be"),
  (lambda: ResamplerConfig(dropout=1.0), "dropout=1.0 must be"),
])
def test_impossible_connectors_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
