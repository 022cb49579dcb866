"""Tiny random decoders of several kinds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lmops_jax.models.transformer import Transformer, TransformerConfig

BASE = dict(vocab_size=31, num_layers=2, width=16, num_heads=4, mlp_width=24, max_length=64)
PLAIN = dict(
  norm="layer", gated_mlp=False, activation="gelu_tanh", qkv_bias=True, out_bias=True,
  mlp_bias=True,
)
CONFIGS = {
  "llama": TransformerConfig(**BASE, num_kv_heads=2),
  "gpt2": TransformerConfig(**BASE, **PLAIN, positions="learned", tied_embeddings=True),
  "alibi": TransformerConfig(**BASE, **PLAIN, positions="alibi", embedding_norm=True),
  "scaled": TransformerConfig(
    **BASE, **PLAIN, positions="sinusoidal", position_offset=2, attention_scale=0.25,
    num_kv_heads=1),
}


@functools.cache
def make(name):
  model = Transformer(CONFIGS[name])
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"])
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(2), len(leaves))
  # Far from the initial values: attention is not uniform and no bias is zero.
  leaves = [8 * leaf if leaf.ndim > 2 else leaf + 0.3 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys)]
  return model, jax.tree.unflatten(structure, leaves)


@pytest.fixture
def tiny():
  return make
