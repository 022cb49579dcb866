"""The head of a discriminator of replaced tokens (ELECTRA, arXiv:2003.10555, section 2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.layers import Projection, activation


class Detector(nn.Module):
  """Product, activation, and product to one number a position: `transform` and `out`."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    """Logits `[B,S] float32` that a token was replaced, from hidden states `[B,S,D]`."""
    c = self.config
    x = Projection(c, (c.width,), (c.width,), ("embed", None), True, name="transform")(hidden)
    x = Projection(c, (c.width,), (1,), ("embed", None), True, name="out")(
      activation(c.activation)(x))
    return x[..., 0].astype(jnp.promote_types(x.dtype, jnp.float32))
