"""CLIP (arXiv:2103.00020): a text and an image tower into one space."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import Count, Size, component
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.layers import Projection, unit_length
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import VisionConfig, VisionTransformer

_INITIAL_LOGIT_SCALE = 2.6592  # log(1 / 0.07), as published


@component(module="models")
@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Both towers.

  Attributes:
    text: causal transformer over tokens.
    vision: vision transformer.
    projection_width: of the common space.
    eos_id: the token at whose first occurrence a text is read; None takes the largest id of a row
      (the first checkpoints, whose EOS is the last of the vocabulary).
  """

  text: TransformerConfig
  vision: VisionConfig
  projection_width: Size = 512
  eos_id: Count | None = None


class Clip(nn.Module):
  """Text and image vectors of one space, each of length 1."""

  config: ClipConfig

  def setup(self):
    c = self.config
    self.text = Transformer(c.text, with_unembedding=False)
    self.vision = VisionTransformer(c.vision)
    width = (c.projection_width,)
    self.text_projection = Projection(c.text, (c.text.width,), width, ("embed", None))
    trunk = c.vision.trunk
    self.visual_projection = Projection(trunk, (trunk.width,), width, ("embed", None))
    self.logit_scale = self.param(
      "logit_scale",
      nn.with_logical_partitioning(nn.initializers.constant(_INITIAL_LOGIT_SCALE), ()),
      (), jnp.dtype(c.text.param_dtype),
    )

  def __call__(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
    """Scaled cosines of every image with every text, `[B images,B texts] float32`."""
    similarity = self.image_features(images) @ self.text_features(tokens).T
    return jnp.exp(self.logit_scale.astype(similarity.dtype)) * similarity

  def text_features(self, tokens: jax.Array) -> jax.Array:
    """Unit vectors `[B,projection_width] float32` of `[B,S]` tokens; what follows EOS is unread."""
    eos_id = self.config.eos_id
    score = tokens if eos_id is None else (tokens == eos_id).astype(jnp.int32)
    last = jnp.argmax(score, axis=1)
    hidden = self.text(tokens)
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return unit_length(self.text_projection(pooled))

  def image_features(self, images: jax.Array) -> jax.Array:
    """Unit vectors `[B,projection_width] float32` of `[B,height,width,3]` normalised images."""
    return unit_length(self.visual_projection(self.vision.pooled(self.vision(images))))
