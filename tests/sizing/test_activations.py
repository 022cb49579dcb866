"""The estimate of what a backward pass keeps, against the values that jax says it keeps."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lmops_jax.models.transformer import Transformer, TransformerConfig
from lmops_jax.sizing import activations

ROWS, LENGTH = 4096, 64  # so many that parameters count for nothing; only shapes are made of them
CONFIG = TransformerConfig(
  vocab_size=64, width=64, num_heads=4, num_kv_heads=2, mlp_width=256, attention="chunked",
  attention_chunk=16, dtype="bfloat16")


def _kept(config, num_layers):
  model = Transformer(dataclasses.replace(config, num_layers=num_layers))
  one = jnp.ones((1, 1), jnp.int32)
  params = nn.unbox(jax.eval_shape(lambda key: model.init(key, one)["params"], jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  return activations.kept_bytes(
    lambda params, tokens: model.apply({"params": params}, tokens), (params,), tokens)


def _estimated(config, num_layers):
  return activations.activation_bytes(
    dataclasses.replace(config, num_layers=num_layers), ROWS, LENGTH, platform="tpu",
    unembedding=False)


@pytest.mark.parametrize("changes", [
  dict(remat="full"), dict(remat="dots"), dict(remat="none"),
  dict(remat="none", attention="xla", dtype="float32", gated_mlp=False),
])
def test_what_a_layer_keeps(changes):
  config = dataclasses.replace(CONFIG, **changes)
  kept, estimated = (of(config, 3) - of(config, 2) for of in (_kept, _estimated))
  assert estimated == pytest.approx(kept, rel=0.02 if config.gated_mlp else 0.15)
