"""Encoders of packed spans: a span's vectors are its own, DeepNorm, and stacks of layers."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.encoders import TextEncoder, TextEncoderConfig, encoder_params
from lmops_jax.models.stacks import with_top
from lmops_jax.models.transformer import Transformer

TRUNK = TransformerConfig(
  vocab_size=24, num_layers=3, width=16, num_heads=2, mlp_width=24, max_length=12, norm="layer",
  norm_placement="post", final_norm=False, residual_scale="deepnorm", branch_gain="deepnorm",
  positions="learned", position_offset=2, embedding_norm=True, activation="gelu", gated_mlp=False,
  qkv_bias=True, out_bias=True, mlp_bias=True, causal=False)
CONFIG = TextEncoderConfig(TRUNK)
E = 12
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], [1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6]])
TOKENS = np.random.default_rng(0).integers(0, 24, (2, E)).astype(np.int32)


@functools.cache
def _params(config=CONFIG):
  made = jax.jit(TextEncoder(config).init)(jax.random.key(0), TOKENS)["params"]
  leaves, treedef = jax.tree.flatten(nn.unbox(made))
  rng = np.random.default_rng(1)
  return treedef.unflatten(
    [(3 * x + 0.1 * rng.normal(size=x.shape)).astype(np.float32) for x in leaves])


@functools.partial(jax.jit, static_argnames="config")
def _features(params, tokens=TOKENS, positions=POSITIONS, segments=SEGMENTS, config=CONFIG):
  return TextEncoder(config).apply(
    {"params": params}, tokens, positions, segments, method="features")


def test_a_span_depends_on_nothing_else():
  """Not on other spans, padding, or the rows beside it: to the bit."""
  want = _features(_params())
  for kept in ((0, SEGMENTS[0] == 1), (0, SEGMENTS[0] == 2), (1, SEGMENTS[1] == 2)):
    others = np.full_like(TOKENS, 7)
    others[kept] = TOKENS[kept]
    segments, positions = 9 - SEGMENTS, 0 * POSITIONS + 5
    segments[kept], positions[kept] = 20, POSITIONS[kept]
    got = _features(_params(), others, positions, segments)
    np.testing.assert_array_equal(got[kept], want[kept])
    assert np.abs(got - want).max() > 0.1


def test_a_span_alone_gives_the_vectors_of_a_packed_one():
  alone, row = np.zeros_like(TOKENS), SEGMENTS[0] == 2
  alone[:, :5] = TOKENS[0, row]
  positions = np.arange(E)[None] + 0 * TOKENS
  got = _features(_params(), alone, positions, (positions < 5).astype(np.int32))
  np.testing.assert_allclose(got[1, :5], _features(_params())[0, row], rtol=1e-5, atol=1e-5)


def test_a_row_may_be_longer_than_a_span():
  tokens, positions, segments = (np.tile(x, (1, 2)) for x in (TOKENS, POSITIONS, SEGMENTS))
  segments[:, E:] += 4
  got = _features(_params(), tokens, positions, segments)
  assert CONFIG.longest_span() == 12 and got.shape == (2, 24, 16)
  for half in (got[:, :E], got[:, E:]):
    np.testing.assert_allclose(half, _features(_params()), rtol=1e-5, atol=1e-5)
  positions[0, 5] = 12
  got = _features(_params(), tokens, positions, segments)
  np.testing.assert_array_equal(np.isnan(got).all((1, 2)), [True, False])


def test_all_of_a_span_is_seen_in_both_directions():
  """The gradient of each vector reaches every token of its segment, and no other."""
  params = _params()

  def reached(embeddings):
    return TextEncoder(CONFIG).apply(
      {"params": params}, embeddings, POSITIONS, SEGMENTS, method="encode")

  jacobian = jax.jit(jax.jacfwd(reached))(np.random.default_rng(2).normal(size=(2, E, 16)))
  size = np.abs(jacobian).sum((2, 5))  # [row, place, row, place]
  for row in range(2):
    np.testing.assert_array_equal(
      size[row, :, row] > 0, SEGMENTS[row][:, None] == SEGMENTS[row][None])
    assert not size[row, :, 1 - row].any()


def _by_hand(params, scale):
  """One packed row in float64, `y = LN(scale x + f(x))` (arXiv:2203.00555, section 2)."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["trunk"])

  def normed(x, n):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * n["scale"] + n["bias"]

  def product(x, n):
    return x @ n["kernel"].reshape(x.shape[-1], -1) + n["bias"].reshape(-1)

  erf = np.vectorize(math.erf)
  x = normed(
    p["embedding"][TOKENS[0]] + p["position_embedding"][POSITIONS[0] + 2], p["embedding_norm"])
  sees = SEGMENTS[0][:, None] == SEGMENTS[0][None]
  for i in range(3):
    of = jax.tree.map(lambda x, i=i: x[i], p["layers"])
    q, k, v = (product(x, of["attention"][n]).reshape(E, 2, 8) for n in ("query", "key", "value"))
    scores = np.where(sees, np.einsum("she,mhe->hsm", q, k) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("hsm,mhe->she", weights, v).reshape(E, 16)
    x = normed(scale * x + product(heads, of["attention"]["out"]), of["attention_norm"])
    up = product(x, of["mlp"]["up"])
    hidden = up * (1 + erf(up / np.sqrt(2))) / 2
    x = normed(scale * x + product(hidden, of["mlp"]["down"]), of["mlp_norm"])
  return x


@pytest.mark.parametrize("scale, number", [("deepnorm", 6**0.25), (1.0, 1.0)])
def test_deepnorm_is_its_definition_and_with_scale_one_the_norm_after_each_part(scale, number):
  config = TextEncoderConfig(dataclasses.replace(TRUNK, residual_scale=scale))
  got = _features(_params(), config=config)
  np.testing.assert_allclose(got[0], _by_hand(_params(), number), rtol=1e-4, atol=1e-5)


def test_both_stacks_start_scaled_as_the_whole():
  """`(8L)^(-1/4)` on values, outputs and MLP, L being the layers of both."""
  def start(**changes):
    config = TextEncoderConfig(dataclasses.replace(TRUNK, **changes), top_layers=2)
    return nn.unbox(jax.jit(TextEncoder(config).init)(jax.random.key(0), TOKENS)["params"])

  scaled, plain = start(), start(branch_gain=1.0)
  for stack in ("trunk", "top"):
    for part, name, factor in (
      ("attention", "query", 1), ("attention", "key", 1), ("attention", "value", 24**-0.25),
      ("attention", "out", 24**-0.25), ("mlp", "up", 24**-0.25), ("mlp", "down", 24**-0.25)):
      got, want = (x[stack]["layers"][part][name]["kernel"] for x in (scaled, plain))
      np.testing.assert_allclose(got, factor * want, rtol=1e-5)


PRE = TextEncoderConfig(dataclasses.replace(
  TRUNK, norm_placement="pre", final_norm=True, residual_scale=1.0, branch_gain=1.0))


@pytest.mark.parametrize("config", [CONFIG, PRE], ids=["deepnorm", "pre"])
def test_a_stack_of_the_last_layers_changes_nothing_but_the_tree(config):
  split = dataclasses.replace(config, top_layers=2)
  params = with_top(_params(config), 2)
  fresh = jax.eval_shape(TextEncoder(split).init, jax.random.key(0), TOKENS)["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(fresh))
  np.testing.assert_allclose(
    _features(params, config=split), _features(_params(config), config=config), rtol=1e-5,
    atol=1e-5)


def test_a_masked_language_model_becomes_an_encoder():
  """With the parts of RoBERTa, and its heads left out."""
  whole = dataclasses.replace(
    TRUNK, residual_scale=1.0, branch_gain=1.0, num_token_types=1, head_transform=True,
    unembedding_bias=True, tied_embeddings=True, pooler=True)
  model, config = Transformer(whole), TextEncoderConfig(whole, top_layers=1)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)["params"])
  assert {"pooler", "head_transform", "unembedding_bias"} <= params.keys()
  encoder = encoder_params(params, top_layers=1)
  fresh = jax.eval_shape(TextEncoder(config).init, jax.random.key(0), TOKENS)["params"]
  assert jax.tree.map(jnp.shape, encoder) == jax.tree.map(jnp.shape, nn.unbox(fresh))
  want = jax.jit(model.apply)({"params": params}, TOKENS, POSITIONS, SEGMENTS)
  np.testing.assert_allclose(_features(encoder, config=config), want, rtol=1e-5, atol=1e-5)


def test_impossible_encoders_and_rows_are_refused():
  with pytest.raises(ValueError, match="TextEncoderConfig.trunk must have causal=False"):
    TextEncoderConfig(dataclasses.replace(TRUNK, causal=True))
  with pytest.raises(ValueError, match="TextEncoderConfig.top_layers=3 must be below the trunk's"):
    TextEncoderConfig(TRUNK, 3)
  with pytest.raises(ValueError, match=r"tokens \[2, 12\], positions \[2, 11\] and segments"):
    jax.eval_shape(lambda: _features(_params(), TOKENS, POSITIONS[:, 1:]))


def test_a_vocabulary_fills_only_what_is_open():
  open_ = TextEncoderConfig(dataclasses.replace(TRUNK, vocab_size=None))
  assert open_.with_vocab_size(9).num_words() == 9
  assert CONFIG.with_vocab_size(9).num_words() == 24
