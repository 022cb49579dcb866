"""Texts to vectors: split in two parts, padded or not, as the whole model gives them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.systems.prototypes.encoding import Encoder, Encoding

CONFIG = TransformerConfig(
  vocab_size=40, num_layers=3, width=16, num_heads=2, mlp_width=32, max_length=40,
  positions="learned", causal=False, tied_embeddings=True)
TEXTS = [[1, 5, 9, 2], [1, 2], [1] + list(range(3, 25)) + [2], [1, 7, 7, 7, 2]]


@pytest.fixture(scope="module", params=[False, True], ids=["bidirectional", "causal"])
def model(request):
  config = dataclasses.replace(CONFIG, causal=request.param)
  whole = Transformer(config, with_unembedding=False)
  params = nn.unbox(whole.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])
  return config, whole, params


def alone(model, text, pooling):
  """The vector of a text that no other stands beside."""
  _, whole, params = model
  hidden = np.asarray(whole.apply({"params": params}, jnp.asarray([text])))[0]
  return {"mean": hidden.mean(axis=0), "first": hidden[0], "last": hidden[-1]}[pooling]


@pytest.mark.parametrize("tuned, pooling", [(0, "mean"), (1, "mean"), (2, "first"), (1, "last")])
def test_vectors_are_those_of_the_whole_model(model, tuned, pooling):
  encoder = Encoder(model[0], Encoding(pooling, tuned, max_tokens=32))
  lower, top = encoder.split(model[2])
  encoded = encoder.encode(lower, TEXTS)
  assert encoded.hidden.shape == ((4, 24, 16) if tuned else (4, 1, 16))
  want = [alone(model, text, pooling) for text in TEXTS]
  np.testing.assert_allclose(encoder.all_vectors(top, encoded), want, atol=2e-5)
  batch = {"hidden": encoded.hidden, "lengths": encoded.lengths}
  np.testing.assert_allclose(encoder.vectors(top, batch), want, atol=2e-5)


def test_unit_vectors_and_dropout(model):
  encoder = Encoder(model[0], Encoding(tuned_layers=1, dropout=0.5, normalize=True, max_tokens=32))
  lower, top = encoder.split(model[2])
  encoded = encoder.encode(lower, TEXTS)
  batch = {"hidden": encoded.hidden, "lengths": encoded.lengths}
  vectors = np.asarray(encoder.vectors(top, batch))
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
  keys = jax.random.split(jax.random.key(0), 4)
  dropped = np.asarray(encoder.vectors(top, batch, keys))
  assert np.abs(dropped - vectors).max() > 1e-2
  fresh = nn.unbox(encoder.init_top(jax.random.key(1)))
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, top)


def test_what_cannot_be_split_is_refused():
  with pytest.raises(ValueError, match="tuned_layers=3 must be below the encoder's 3 layers"):
    Encoder(CONFIG, Encoding(tuned_layers=3, max_tokens=32))
  with pytest.raises(ValueError, match="max_tokens=128 is beyond the encoder's 40 positions"):
    Encoder(CONFIG, Encoding())
  shared = dataclasses.replace(CONFIG, relative_buckets=8, relative_distance=20, positions="none")
  with pytest.raises(ValueError, match="share a table of relative biases"):
    Encoder(shared, Encoding(tuned_layers=1, max_tokens=32))
