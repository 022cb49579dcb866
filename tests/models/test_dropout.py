"""Dropout: its share and scale, and that draws are functions of an example's key alone."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.mesh.meshes import MeshConfig
from lmops_jax.models.attention import self_attention
from lmops_jax.models.dropout import dropped
from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.training.learner import supervised
from lmops_jax.training.losses import lm_example_losses
from lmops_jax.training.optimizers import sgd

RATES = dict(embedding_dropout=0.1, residual_dropout=0.2, attention_dropout=0.3)
PLAIN = TransformerConfig(
  vocab_size=23, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24, max_length=32)
CONFIG = dataclasses.replace(PLAIN, **RATES)
TOKENS = np.random.default_rng(0).integers(0, 23, (4, 9)).astype(np.int32)
KEYS = jax.random.split(jax.random.key(7), 4)


@functools.cache
def _params():
  params = nn.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), TOKENS)["params"])
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, params)


def _hidden(config, tokens=TOKENS, keys=KEYS):
  return jax.jit(lambda p, t, k: Transformer(config).apply({"params": p}, t, keys=k))(
    _params(), tokens, keys)


def _value_and_grad(config):
  def loss(params, keys):
    logits = Transformer(config).apply({"params": params}, TOKENS, keys=keys, method="logits")
    return jnp.mean(jnp.square(logits) ** 1.5)

  return jax.jit(jax.value_and_grad(loss))(_params(), KEYS)


@pytest.fixture(scope="module")
def value_and_grad():
  return _value_and_grad(CONFIG)


def test_without_keys_or_rates_nothing_changes():
  want = _hidden(PLAIN, keys=None)
  np.testing.assert_array_equal(_hidden(CONFIG, keys=None), want)
  np.testing.assert_array_equal(_hidden(PLAIN), want)
  assert np.abs(_hidden(CONFIG) - want).max() > 0.1


@pytest.mark.parametrize("changes", [
  pytest.param({"remat": "full"}, marks=pytest.mark.slow),
  {"scan_layers": False, "remat": "dots"},
  {"attention": "chunked", "attention_chunk": 2},
])
def test_execution_choices_draw_the_same(value_and_grad, changes):
  got = _value_and_grad(dataclasses.replace(CONFIG, **changes))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, value_and_grad)


def test_an_example_draws_by_its_key_alone():
  want = _hidden(CONFIG)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    _hidden(CONFIG, TOKENS[order], KEYS[order]), want[order], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    _hidden(CONFIG, TOKENS[1:2], KEYS[1:2]), want[1:2], rtol=1e-5, atol=1e-6)
  same_text = _hidden(CONFIG, TOKENS[[0, 0, 0, 0]])
  assert np.abs(same_text[0] - same_text[1]).max() > 0.1


def test_a_share_is_dropped_and_the_rest_scaled():
  x = np.random.default_rng(1).normal(size=(4, 50, 60)).astype(np.float32)
  got = dropped(jnp.asarray(x), KEYS, 0.3)
  is_kept = np.asarray(got) != 0
  np.testing.assert_allclose(got[is_kept], x[is_kept] / 0.7, rtol=1e-6)
  assert is_kept.mean() == pytest.approx(0.7, abs=0.02)  # 4.8 standard errors
  assert dropped(jnp.asarray(x, jnp.bfloat16), KEYS, 0.3).dtype == jnp.bfloat16


def test_places_draw_apart():
  """Parts that always give 1: the four of two layers keep a binomial number of them."""
  config = dataclasses.replace(
    PLAIN, out_bias=True, mlp_bias=True, residual_dropout=0.5, final_norm=False, width=64,
    num_kv_heads=None)
  params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"])
  params["embedding"] = jnp.zeros_like(params["embedding"])
  for part, name in (("attention", "out"), ("mlp", "down")):
    of = params["layers"][part][name]
    params["layers"][part][name] = {"kernel": 0 * of["kernel"], "bias": 1 + 0 * of["bias"]}
  for scan in (True, False):
    model = Transformer(dataclasses.replace(config, scan_layers=scan))
    sums = jax.jit(lambda p, k, m=model: m.apply({"params": p}, TOKENS, keys=k))(params, KEYS)
    counts = np.bincount(np.round(np.asarray(sums).ravel() / 2).astype(int), minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), np.array([1, 4, 6, 4, 1]) / 16, atol=0.04)


def test_embeddings_are_dropped_behind_their_positions():
  config = dataclasses.replace(
    PLAIN, positions="learned", embedding_dropout=0.5, num_layers=1, final_norm=False)
  params = nn.unbox(jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"])
  params["layers"] = jax.tree.map(jnp.zeros_like, params["layers"])  # blocks that add nothing
  model = Transformer(config)
  got, want = (
    np.asarray(model.apply({"params": params}, TOKENS, **options))
    for options in ({"keys": KEYS}, {}))
  is_kept = got != 0
  np.testing.assert_allclose(got[is_kept], 2 * want[is_kept], rtol=1e-6)
  assert is_kept.mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("with_segments", [False, True])
def test_attention_drops_probabilities(with_segments):
  """Values that are unit vectors read the probabilities off."""
  rng = np.random.default_rng(2)
  q, k = (rng.normal(size=(4, 16, heads, 16)).astype(np.float32) for heads in (4, 2))
  v = np.broadcast_to(np.eye(16, dtype=np.float32)[None, :, None], (4, 16, 2, 16))
  segments = np.repeat([[0] * 7 + [1] * 9], 4, 0).astype(np.int32) if with_segments else None

  @functools.partial(jax.jit, static_argnames=("kind", "rate"))
  def attention(keys, kind="xla", rate=0.4):
    return self_attention(q, k, v, segments, kind=kind, chunk=3, dropout=rate, keys=keys)

  want, got = attention(None), attention(KEYS)
  is_kept = np.asarray(got) != 0
  np.testing.assert_allclose(got[is_kept], want[is_kept] / 0.6, rtol=1e-5)
  seen = np.asarray(want) != 0
  assert is_kept[seen].mean() == pytest.approx(0.6, abs=0.04)
  apart = is_kept[:, :, 0] != is_kept[:, :, 1]  # heads that share keys draw apart
  assert apart[seen[:, :, 0]].mean() == pytest.approx(0.48, abs=0.06)
  np.testing.assert_allclose(attention(KEYS, kind="chunked"), got, rtol=1e-5, atol=1e-6)


LOSSES = lm_example_losses(Transformer(CONFIG))
BATCH = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1),
         "loss_mask": np.ones(TOKENS.shape, np.float32)}


def _init(key):
  return _params()


def _step(mesh=None, accumulate=1, keyed=True, seed=3):
  partitioner = None if mesh is None else mesh.build()
  learner = supervised(
    _init, LOSSES, sgd(0.1), accumulate=accumulate, keyed=keyed,
    partitioner=partitioner)
  if partitioner is None:
    return jax.jit(learner.step)(learner.init(None), BATCH, jax.random.key(seed))
  with partitioner.activate():
    return jax.jit(learner.step)(
      learner.init(None), partitioner.place_batch(BATCH), jax.random.key(seed))


@pytest.fixture(scope="module")
def one_step():
  return _step()


@pytest.mark.parametrize("mesh, accumulate", [
  (None, 4), (MeshConfig(2, 2, 2), 1)])
def test_a_step_draws_the_same_in_micro_batches_and_on_a_mesh(one_step, mesh, accumulate):
  got = _step(mesh, accumulate)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, one_step)


def test_a_step_draws_by_its_key_and_not_without_keys(one_step):
  assert _step(seed=4)[1]["loss_sum"] != one_step[1]["loss_sum"]
  want = jnp.sum(LOSSES(_params(), BATCH))
  assert float(_step(keyed=False)[1]["loss_sum"]) == pytest.approx(float(want), rel=1e-6)
  assert float(one_step[1]["loss_sum"]) != pytest.approx(float(want), rel=1e-3)


@pytest.mark.parametrize("changes, message", [
  ({"attention": "splash"}, "'splash' has no dropout and .*attention_dropout=0.3; set the latter"),
  ({"attention": "cudnn"}, "attention='cudnn' has no dropout"),
  ({"residual_dropout": 1.0}, "residual_dropout=1.0 must be"),
  ({"embedding_dropout": -0.1}, "embedding_dropout=-0.1 must be"),
])
def test_dropout_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)
