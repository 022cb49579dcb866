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


def _run(config, rows, length):
  """What runs the model, shapes of its parameters, and of a batch."""
  model = Transformer(config)
  one = jnp.ones((1, 1), jnp.int32)
  params = nn.unbox(jax.eval_shape(lambda key: model.init(key, one)["params"], jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  return lambda params, tokens: model.apply({"params": params}, tokens), params, tokens


def _kept(config, num_layers):
  run, params, tokens = _run(dataclasses.replace(config, num_layers=num_layers), ROWS, LENGTH)
  return activations.kept_bytes(run, (params,), tokens)


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


def test_on_a_cpu_the_scores_of_one_head_exist_at_a_time():
  config = dataclasses.replace(
    CONFIG, num_layers=1, num_heads=8, num_kv_heads=8, mlp_width=64, max_length=1024,
    attention_chunk=128, dtype="float32", scan_layers=False)
  run, params, tokens = _run(config, 4, 1024)
  taken = jax.jit(jax.grad(lambda *given: run(*given).sum())).lower(
    params, tokens).compile().memory_analysis().temp_size_in_bytes
  estimated = activations.activation_bytes(config, 4, 1024, platform="cpu", unembedding=False)
  assert taken / 2 < estimated < taken * 2
