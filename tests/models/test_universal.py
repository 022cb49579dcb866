"""Encoders docked to a decoder: what reaches what, what is trained, and generation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import (
  LinearConnectorConfig,
)
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.universal import (
  ENCODER_INPUTS,
  Docking,
  UniversalConfig,
  UniversalLM,
)
from lmops_jax.training.losses import LMExampleLosses

PARTS = dict(
  norm="layer", gated_mlp=False, qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu")
DEEP = dict(
  norm_placement="post", final_norm=False, residual_scale="deepnorm", branch_gain="deepnorm")
TEXT = TransformerConfig(
  vocab_size=40, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=32, **PARTS, **DEEP,
  positions="sinusoidal", embedding_scale=4.0, tied_embeddings=True, initialization="xavier")
TRUNK = TransformerConfig(
  vocab_size=40, num_layers=3, width=12, num_heads=2, mlp_width=20, max_length=16, **PARTS, **DEEP,
  positions="learned", embedding_norm=True, initialization="xavier", causal=False)
READER = Docking(TextEncoderConfig(TRUNK, top_layers=1), LinearConnectorConfig())
CONFIG = UniversalConfig(TEXT, READER)
MODEL = UniversalLM(CONFIG)
S, E, START = 12, 12, 1
SPANS = ((3, 5), (5, 8))  # beside each other, of different lengths


@functools.cache
def _boxed(config=CONFIG):
  ids = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(UniversalLM(config).init)(jax.random.key(0), ids)["params"]


def _params(config=CONFIG):
  return nn.unbox(_boxed(config))


def _row(tokens, spans=SPANS, length=E):
  """A row of a batch by its definition: `<s>` and span after span; targets by input position."""
  row = {name: np.zeros(length, np.int32) for name in ENCODER_INPUTS[:3]}
  index, mask, end = np.full(len(tokens), -1, np.int32), np.ones(len(tokens), np.float32), 0
  for number, (first, last) in enumerate(spans):
    here = slice(end, end + 1 + last - first)
    row["encoder_tokens"][here] = [START, *tokens[first:last]]
    row["encoder_positions"][here] = np.arange(1 + last - first)
    row["encoder_segments"][here] = number + 1
    index[first:last] = end + 1 + np.arange(last - first)
    mask[first : last - 1] = 0
    end = here.stop
  mask[-1] = 0
  return {**row, "vector_index": index, "tokens": np.asarray(tokens, np.int32),
          "targets": np.append(tokens[1:], 0).astype(np.int32), "loss_mask": mask}


def _batch(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _tokens(seed=0, length=S):
  """No token twice."""
  return np.random.default_rng(seed).permutation(np.arange(2, 40))[:length]


def _whole(model, batch, keys=None):
  given = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
  vectors = model.row_vectors(**given, keys=keys)
  return model.logits(
    batch["tokens"], vectors=vectors, vector_index=batch.get("vector_index"), keys=keys)


def _losses(params, batch, model=MODEL):
  given = {name: batch[name] for name in ENCODER_INPUTS if name in batch}
  rest = {name: x for name, x in batch.items() if name not in given}
  vectors = model.apply({"params": params}, **given, method="row_vectors")
  return LMExampleLosses(model)(params, rest if vectors is None else {**rest, "vectors": vectors})


@functools.partial(jax.jit, static_argnames=("model", "method", "fresh"))
def _apply(params, *args, model=MODEL, method=None, **kwargs):
  return model.apply({"params": params}, *args, method=method, **kwargs)


BATCH = _batch([_row(_tokens()), _row(_tokens(1), [(1, 7)]), _row(_tokens(2), [])] * 2
               + [_row(_tokens(3), [(2, 3), (9, 12)]), _row(_tokens(4), [(4, 10)])])


@pytest.fixture(scope="module")
def logits():
  return _apply(_params(), BATCH, method=_whole)


def test_without_spans_the_loss_is_the_causal_one_to_the_bit():
  """Whether a row has none or the batch has none."""
  none = _batch([_row(_tokens(i), []) for i in range(8)])
  causal = {name: none[name] for name in ("tokens", "targets", "loss_mask")}
  want = jax.jit(LMExampleLosses(Transformer(TEXT)))(_params()["text"], causal)
  np.testing.assert_array_equal(jax.jit(_losses)(_params(), none), want)
  np.testing.assert_array_equal(jax.jit(_losses)(_params(), causal), want)
  alone = UniversalLM(UniversalConfig(TEXT))
  got = jax.jit(functools.partial(_losses, model=alone))({"text": _params()["text"]}, causal)
  np.testing.assert_array_equal(got, want)
