"""Vision transformer: images to a sequence of patch vectors (arXiv:2010.11929, as CLIP wires it).

Patches are embedded by one product without bias, a class vector goes in front, learned positions
are added, a norm comes before the blocks, and another one after them is applied where vectors are
used.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import PositiveInt, component
from lmops_jax.models import layers as layers_lib
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.layers import INIT_STDDEV
from lmops_jax.models.transformer import Transformer

NUM_CHANNELS = 3


@component(module="models")
@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Shape of a `VisionTransformer`.

  Attributes:
    trunk: the blocks; `positions` must be "none" (they are this module's), `causal` and
      `final_norm` False.
    image_size: height and width of an image in pixels.
    patch_size: height and width of a patch, a divisor of `image_size`.

  Raises:
    ValueError: naming the field, for values that do not make a model.
  """

  trunk: TransformerConfig
  image_size: PositiveInt = 224
  patch_size: PositiveInt = 16

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ValueError(
        f"models.VisionConfig.image_size={self.image_size} must be a multiple of patch_size="
        f"{self.patch_size}."
      )
    if self.trunk.causal or self.trunk.final_norm or self.trunk.positions != "none":
      raise ValueError(
        "models.VisionConfig.trunk must have causal=False, final_norm=False and positions='none'."
      )
    if self.num_patches >= self.trunk.max_length:
      raise ValueError(
        f"models.VisionConfig.trunk.max_length={self.trunk.max_length} must exceed the "
        f"{self.num_patches} patches of an image."
      )

  @property
  def num_patches(self) -> int:
    """Patches of an image."""
    return (self.image_size // self.patch_size) ** 2


class VisionTransformer(nn.Module):
  """Images `[B,height,width,3]` to vectors `[B,1+patches,D]`, the class vector first.

  Parameters: `class_embedding [D]`, `patch_embedding [P,P,3,D]`, `position_embedding
  [1+patches,D]`, `pre_norm`, `trunk/layers`, `post_norm`.
  """

  config: VisionConfig

  def setup(self):
    c, trunk = self.config, self.config.trunk

    def parameter(name, shape, axes):
      init = nn.with_logical_partitioning(nn.initializers.normal(INIT_STDDEV), axes)
      return self.param(name, init, shape, jnp.dtype(trunk.param_dtype))

    d, p = trunk.width, c.patch_size
    self.class_embedding = parameter("class_embedding", (d,), ("embed",))
    self.patch_embedding = parameter(
      "patch_embedding", (p, p, NUM_CHANNELS, d), (None, None, None, "embed")
    )
    self.position_embedding = parameter(
      "position_embedding", (1 + c.num_patches, d), (None, "embed")
    )
    self.pre_norm = layers_lib.norm(trunk)
    self.trunk = Transformer(trunk, with_unembedding=False, with_embedding=False)
    self.post_norm = layers_lib.norm(trunk)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Vectors after the last block, `[B,1+patches,D]`, not normed.

    Raises:
      ValueError: for images of another size.
    """
    c, dtype = self.config, self.config.trunk.dtype
    if images.shape[1:] != (c.image_size, c.image_size, NUM_CHANNELS):
      raise ValueError(
        f"The images are {list(images.shape[1:])} and models.VisionConfig wants "
        f"[{c.image_size}, {c.image_size}, {NUM_CHANNELS}]; resize them, channels last."
      )
    x = patches(images, c.patch_size).astype(dtype)
    x = x @ self.patch_embedding.astype(dtype).reshape(x.shape[-1], -1)
    first = jnp.broadcast_to(self.class_embedding.astype(dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1) + self.position_embedding.astype(dtype)
    x = self.trunk.encode(self.pre_norm(x))
    if self.is_initializing():
      self.post_norm(x)
    return x

  def pooled(self, vectors: jax.Array) -> jax.Array:
    """The normed class vector `[B,D]` of `__call__`'s result."""
    return self.post_norm(vectors[:, 0])


def patches(images: jax.Array, size: int) -> jax.Array:
  """`[B,height,width,C]` to `[B,patches,size*size*C]`, row by row."""
  b, height, width, channels = images.shape
  x = images.reshape(b, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * channels)
