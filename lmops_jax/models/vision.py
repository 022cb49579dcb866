"""Vision transformer: images to a sequence of patch vectors (arXiv:2010.11929, as CLIP wires it).

Patches are embedded by one product without bias, a class vector goes in front, learned positions
are added, a norm comes before the blocks, and another one after them is applied to the vectors that
are used: CLIP uses the class vector, Kosmos all of them.

Images of other sizes than the positions were learned for get positions interpolated over the grid
of patches: cubic convolution (Keys 1981) with a = -0.75, half-pixel centres, repeated edges and no
antialiasing, as torch computes it. `jax.image.resize` has a = -0.5.

The last blocks may be a stack of parameters of their own (`models.stacks`); to freeze all others,

    optim.partition.rules = {'vision/(?!top/|post_norm/).*': None, '.*': @optim.adamw()}
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmops_jax.config.setting_types import Count, Positive, PositiveInt, component
from lmops_jax.models import layers as layers_lib
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.layers import INIT_STDDEV
from lmops_jax.models.stacks import StackedEncoder, check_top

NUM_CHANNELS = 3
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB, 1 being white
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CUBIC = -0.75


@component(module="models")
@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Shape of a `VisionTransformer`.

  Attributes:
    trunk: the blocks; `positions` must be "none" (they are this module's), `causal` and
      `final_norm` False.
    image_size: height and width of an image in pixels.
    patch_size: height and width of a patch, a divisor of `image_size`.
    any_size: images may also have other sides, even unequal ones, that are multiples of
      `patch_size`; positions are then interpolated.
    top_layers: number of the trunk's last blocks whose parameters are a stack of their own.
    pixel_mean, pixel_std: mean and deviation of red, green and blue that bytes are normalised by, 1
      being white.

  Raises:
    ValueError: for values that do not make a model; it names the field.
  """

  trunk: TransformerConfig
  image_size: PositiveInt = 224
  patch_size: PositiveInt = 16
  any_size: bool = False
  top_layers: Count = 0
  pixel_mean: tuple[float, float, float] = CLIP_MEAN
  pixel_std: tuple[Positive, Positive, Positive] = CLIP_STD

  def __post_init__(self):
    name = f"models.{type(self).__name__}"
    if self.image_size % self.patch_size:
      raise ValueError(
        f"{name}.image_size={self.image_size} must be a multiple of patch_size="
        f"{self.patch_size}."
      )
    trunk = self.trunk
    if trunk.causal or trunk.final_norm or trunk.positions != "none" or trunk.relative_buckets:
      raise ValueError(
        f"{name}.trunk must have causal=False, final_norm=False, positions='none' and "
        "relative_buckets=0."
      )
    check_top(name, self.trunk, self.top_layers)
    if self.num_patches >= self.trunk.max_length:
      raise ValueError(
        f"{name}.trunk.max_length={self.trunk.max_length} must exceed the "
        f"{self.num_patches} patches of an image."
      )

  @property
  def num_patches(self) -> int:
    """Patches of an image."""
    return (self.image_size // self.patch_size) ** 2

  def module(self) -> VisionTransformer:
    """The encoder."""
    return VisionTransformer(self)

  def feature_width(self) -> int:
    """D of its vectors."""
    return self.trunk.width

  def num_words(self) -> int | None:
    """None are read."""
    return 0

  def longest_text(self) -> int:
    """None are read."""
    return 0

  def with_vocab_size(self, vocab_size: int) -> VisionConfig:
    """The same, which has no table of words."""
    return self

  def num_features(self) -> int:
    """Vectors of an image of its own size, that of the class included."""
    return 1 + self.num_patches

  def features_of(self, height: int, width: int) -> int:
    """See `PictureEncoderConfig`."""
    side, patch = self.image_size, self.patch_size
    if (height, width) != (side, side) and not self.any_size:
      raise ValueError(
        f"pictures of {height} x {width} are given and models.{type(self).__name__}.image_size is "
        f"{side}; give both one size, or set any_size."
      )
    if height % patch or width % patch:
      raise ValueError(
        f"pictures of {height} x {width} are given, which are not multiples of "
        f"models.{type(self).__name__}.patch_size={patch}; give others."
      )
    return 1 + height // patch * (width // patch)

  def example_inputs(self) -> tuple[jax.Array, ...]:
    """An image of its own size, as `features` takes it."""
    return jnp.zeros((1, self.image_size, self.image_size, NUM_CHANNELS)),


class VisionTransformer(StackedEncoder):
  """Images `[B,height,width,3]` to vectors `[B,1+patches,D]`, the class vector first.

  Parameters: `class_embedding [D]`, `patch_embedding [P,P,3,D]`, `position_embedding
  [1+patches,D]`, `pre_norm`, `trunk/layers`, `top/layers` with `top_layers`, `post_norm`.
  """

  config: VisionConfig

  def setup(self):
    super().setup()
    self._setup_images()

  def _setup_images(self):
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
    self.post_norm = layers_lib.norm(trunk)

  def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Vectors after the last block, `[B,1+patches,D]`, not normed.

    Args:
      images: `[B,height,width,3]`, bytes, or floats that are normalised already.
      keys: `[B]` typed keys of dropout, one for each image; None drops nothing.

    Raises:
      ValueError: for images of a size that the configuration does not allow.
    """
    x = self.encode(self.pre_norm(self.embed_images(images)), keys=keys)
    if self.is_initializing():
      self.post_norm(x)
    return x

  def embed_images(self, images: jax.Array) -> jax.Array:
    """The class vector and the patches' with their positions, `[B,1+patches,D]`, not normed."""
    c, dtype = self.config, self.config.trunk.dtype
    self._check(images.shape)
    if images.dtype == jnp.uint8:
      images = (images / np.float32(255) - np.float32(c.pixel_mean)) / np.float32(c.pixel_std)
    x = patches(images, c.patch_size).astype(dtype)
    x = x @ self.patch_embedding.astype(dtype).reshape(x.shape[-1], -1)
    first = jnp.broadcast_to(self.class_embedding.astype(dtype), (x.shape[0], 1, x.shape[2]))
    return jnp.concatenate([first, x], axis=1) + self._positions(images.shape).astype(dtype)

  def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """All of `__call__`'s vectors `[B,1+patches,D]`, normed."""
    return self.post_norm(self(images, keys))

  def pooled(self, vectors: jax.Array) -> jax.Array:
    """The normed class vector `[B,D]` of `__call__`'s result."""
    return self.post_norm(vectors[:, 0])

  def _check(self, shape):
    c = self.config
    name, size, sides = f"models.{type(c).__name__}", c.image_size, shape[1:3]
    if len(shape) != 4 or shape[3] != NUM_CHANNELS or not (c.any_size or sides == (size, size)):
      raise ValueError(
        f"The images are {list(shape[1:])} and {name} wants "
        f"[{size}, {size}, {NUM_CHANNELS}]; resize them, channels last."
      )
    if any(side % c.patch_size or not side for side in sides):
      raise ValueError(
        f"The images are {list(shape[1:])} and their sides must be multiples of "
        f"{name}.patch_size={c.patch_size}; resize them."
      )

  def _positions(self, shape):
    """Position vectors `[1+patches,D]` for images of that shape."""
    c, table = self.config, self.position_embedding
    old, new = c.image_size // c.patch_size, [side // c.patch_size for side in shape[1:3]]
    if new == [old, old]:
      return table
    grid = table[1:].reshape(old, old, -1)
    rows, columns = (cubic_matrix(num, old).astype(table.dtype) for num in new)
    grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision="highest")
    return jnp.concatenate([table[:1], grid.reshape(-1, grid.shape[-1])])


def patches(images: jax.Array, size: int) -> jax.Array:
  """`[B,height,width,C]` to `[B,patches,size*size*C]`, row by row."""
  b, height, width, channels = images.shape
  x = images.reshape(b, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * channels)


def cubic_matrix(num_new: int, num_old: int) -> np.ndarray:
  """`[new,old] float32`: cubic interpolation of `old` samples at `new` points, see the module."""

  def weight(distance):
    d, a = np.abs(distance), _CUBIC
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))

  at = (np.arange(num_new) + 0.5) * num_old / num_new - 0.5
  matrix, point = np.zeros((num_new, num_old)), np.arange(num_new)
  for tap in range(-1, 3):
    sample = np.floor(at) + tap
    np.add.at(
      matrix, (point, np.clip(sample, 0, num_old - 1).astype(int)), weight(at - sample))
  return matrix.astype(np.float32)
