"""Vectors in place of word embeddings: what replaces what, its gradient, and the cache."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.cache import empty_cache
from lmops_jax.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
  vocab_size=23, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32, norm="layer",
  gated_mlp=False, positions="sinusoidal", position_offset=2, embedding_scale=4.0,
  tied_embeddings=True)
MODEL = Transformer(CONFIG)
B, S, M = 3, 9, 4
# Row 0 has both images, each of two vectors, beside each other; row 1 the second; row 2 words only.
INDEX = np.full((B, S), -1, np.int32)
INDEX[0, 1:5] = range(4)
INDEX[1, 3:5] = 2, 3


@pytest.fixture(scope="module")
def params():
  made = nn.unbox(jax.jit(MODEL.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"])
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, made)


@pytest.fixture(scope="module")
def row():
  rng = np.random.default_rng(0)
  return (rng.integers(0, 23, (B, S)).astype(np.int32),
          rng.normal(size=(B, M, 16)).astype(np.float32))


@functools.partial(jax.jit, static_argnames=("model", "method", "fresh"))
def _apply(model, params, *args, **kwargs):
  return model.apply({"params": params}, *args, **kwargs)


_logits = functools.partial(_apply, MODEL, method="logits")


def test_a_vector_is_scaled_and_placed_as_a_word_is(params, row):
  """Looked up by hand, the words of a text are that text, bit for bit."""
  tokens, _ = row
  vectors = params["embedding"][tokens]
  index = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
  got = _logits(params, np.zeros_like(tokens), vectors=vectors, vector_index=index)
  np.testing.assert_array_equal(got, _logits(params, tokens))


def test_words_that_are_replaced_are_never_read(params, row):
  tokens, vectors = row
  other = np.where(INDEX >= 0, np.where(INDEX % 2, 99, 7), tokens)  # 99 is outside the vocabulary
  want = _logits(params, tokens, vectors=vectors, vector_index=INDEX)
  np.testing.assert_array_equal(
    _logits(params, other, vectors=vectors, vector_index=INDEX), want)
  assert np.isfinite(want).all()


def test_rows_of_words_alone_are_those_of_the_plain_decoder(params, row):
  tokens, vectors = row
  got = _logits(params, tokens, vectors=vectors, vector_index=INDEX)
  plain = _logits(params, tokens)
  np.testing.assert_array_equal(got[2], plain[2])
  assert np.abs(got[:2] - plain[:2]).max() > 1e-2


def test_the_order_of_images_matters_and_where_they_are_kept_does_not(params, row):
  tokens, vectors = row
  want = _logits(params, tokens, vectors=vectors, vector_index=INDEX)
  swapped = vectors[:, [2, 3, 0, 1]]
  other = _logits(params, tokens, vectors=swapped, vector_index=INDEX)
  assert np.abs(other[0, 4:] - want[0, 4:]).max() > 1e-3
  index = np.where(INDEX >= 0, (INDEX + 2) % 4, INDEX).astype(np.int32)
  np.testing.assert_array_equal(
    _logits(params, tokens, vectors=swapped, vector_index=index), want)


def test_no_gradient_reaches_words_that_are_replaced(params, row):
  _, vectors = row
  tokens = np.arange(S)[None]  # one row of the table a position
  tokens[0, 2] = 40  # outside of the vocabulary

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1))
  def gradient(table, vectors):
    hidden = MODEL.apply({"params": params | {"embedding": table}}, tokens, vectors=vectors,
                         vector_index=INDEX[:1])
    return jnp.sum(hidden ** 3)

  of_words, of_vectors = gradient(params["embedding"], vectors[:1])
  reached = np.abs(of_words).max(axis=1) > 0
  np.testing.assert_array_equal(reached[:S], INDEX[0] < 0)
  assert not reached[S:].any()
  assert (np.abs(of_vectors).max(axis=2) > 0).all()


@pytest.mark.parametrize("cuts", [(3, 6), pytest.param((1,) * 9, marks=pytest.mark.slow)])
def test_a_prefill_with_vectors_equals_the_whole_row(params, row, cuts):
  """Also cut within an image: each piece has the index of its own tokens."""
  tokens, vectors = row
  want = _apply(MODEL, params, tokens, vectors=vectors, vector_index=INDEX)
  cache, pieces, start = empty_cache(CONFIG, B, S), [], 0
  for length in cuts:
    here = slice(start, start + length)
    hidden, cache = _apply(
      MODEL, params, tokens[:, here], cache, fresh=start == 0, vectors=vectors,
      positions=np.broadcast_to(np.arange(start, start + length), (B, length)),
      vector_index=INDEX[:, here], method="extend")
    pieces.append(hidden)
    start += length
  np.testing.assert_allclose(np.concatenate(pieces, 1), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(params, row, side):
  """In a prefill, behind which words go on."""
  tokens, vectors = row
  want = _apply(MODEL, params, tokens, vectors=vectors, vector_index=INDEX)
  real = slice(3, None) if side == "left" else slice(7)
  padded, index = np.full((B, 10), 5, np.int32), np.full((B, 10), -1, np.int32)
  padded[:, real], index[:, real] = tokens[:, :7], INDEX[:, :7]
  positions = np.full((B, 10), -1)
  positions[:, real] = np.arange(7)
  first, cache = _apply(
    MODEL, params, padded, empty_cache(CONFIG, B, 12), positions=positions, valid=positions >= 0,
    fresh=True, vectors=vectors, vector_index=index, method="extend")
  second, _ = _apply(
    MODEL, params, tokens[:, 7:], cache, positions=np.broadcast_to([7, 8], (B, 2)),
    method="extend")
  np.testing.assert_allclose(
    np.concatenate([first[:, real], second], 1), want, rtol=2e-5, atol=2e-5)


def test_embeddings_are_public_and_what_the_blocks_read(params, row):
  tokens, vectors = row
  embedded = _apply(MODEL, params, tokens, vectors=vectors, vector_index=INDEX, method="embed")
  states = _apply(MODEL, params, tokens, vectors=vectors, vector_index=INDEX, method="all_hidden")
  np.testing.assert_array_equal(states[0], embedded)
  positions = _apply(MODEL, params | {"embedding": 0 * params["embedding"]}, tokens, method="embed")
  np.testing.assert_allclose(
    embedded[0, 1:5], 4.0 * vectors[0] + positions[0, 1:5], rtol=1e-6, atol=1e-6)


def test_an_index_beyond_the_vectors_is_not_silent(params, row):
  tokens, vectors = row
  index = INDEX.copy()
  index[1, 4] = M
  logits = _logits(params, tokens, vectors=vectors, vector_index=index)
  assert np.isnan(logits[1, 4:]).all() and np.isfinite(logits[0]).all()


@pytest.mark.parametrize("vectors, index", [
  (None, INDEX), (np.zeros((B, M, 16), np.float32), None),
  (np.zeros((B, M, 15), np.float32), INDEX), (np.zeros((2, M, 16), np.float32), INDEX),
  (np.zeros((B, 16), np.float32), INDEX), (np.zeros((B, M, 16), np.float32), INDEX[:, 1:]),
])
def test_vectors_that_do_not_fit_are_refused(params, vectors, index):
  with pytest.raises(ValueError, match=r"give vectors \[3, vectors of a row, 16\] and an index"):
    MODEL.apply({"params": params}, np.zeros((B, S), np.int32), vectors=vectors, vector_index=index)
