"""A language model with an image encoder docked to it (Kosmos-1, arXiv:2302.14045).

Images go through a vision tower and a connector and become a few vectors each, which stand among
the words of a text. The language model is a `Transformer` like any other: generation takes it by
itself, with `params["text"]` and vectors that `image_vectors` has computed once, however many
beams, candidates or turns read them.

Parameters: `text/` (`models.transformer`), `vision/` (`models.vision`), `connector/`
(`models.connectors`). Kosmos-1 freezes CLIP except its last layer; with `vision.top_layers=1`

    optim.partition.rules = {
      'vision/(?!top/|post_norm/).*': None,
      '.*': @optim.adamw(),
    }

and with `'vision/.*': None` all of CLIP is frozen. See `models.vision` on what that saves.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import component
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ConnectorConfig
from lmops_jax.models.dropout import folded
from lmops_jax.models.layers import unit_length
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import NUM_CHANNELS, VisionConfig, VisionTransformer

_IMAGES = 1 << 30  # folded into keys for images; layers of texts have the small numbers
_SMALLEST = 1e-12  # the least length that vectors are divided by, as in the published code


@component(module="models")
@dataclasses.dataclass(frozen=True)
class DockedConfig:
  """Parts of a `DockedLM`.

  Attributes:
    text: the language model's.
    vision: the image encoder's; all of its vectors are used, normed.
    connector: one of `models.connectors`.
    unit_features: divide the encoder's vectors by their lengths (Kosmos).

  Raises:
    ValueError: for parts that do not fit each other.
  """

  text: TransformerConfig
  vision: VisionConfig
  connector: ConnectorConfig
  unit_features: bool = True

  def __post_init__(self):
    self.connector.module(self.text, self.vision.trunk.width)

  @property
  def vocab_size(self) -> int | None:
    """V of the language model."""
    return self.text.vocab_size

  @property
  def vectors_per_image(self) -> int:
    """M, of an image of the vision tower's own size."""
    return self.connector.num_vectors(1 + self.vision.num_patches)


class DockedLM(nn.Module):
  """Texts with images in them to hidden states and logits."""

  config: DockedConfig

  def setup(self):
    c = self.config
    self.text = Transformer(c.text)
    self.vision = VisionTransformer(c.vision)
    self.connector = c.connector.module(c.text, c.vision.trunk.width)

  def image_vectors(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """The vectors that stand for each image among the words, `[N,M,W]`.

    Args:
      images: `[N,height,width,3]`, bytes, or floats that are normalised already.
      keys: `[N]` typed keys of dropout, one for each image; None drops nothing.
    """
    return self.connect(self.features(images, keys), keys)

  def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """What the connector reads of each image, `[N,P,width]` in the language model's dtype.

    With a frozen tower without dropout they depend on the image alone, and can be computed once.

    Args:
      images, keys: as `image_vectors` takes them.
    """
    features = self.vision.features(images, folded(keys, 0))
    if self.config.unit_features:
      features = unit_length(features, _SMALLEST)
    return features.astype(self.config.text.dtype)

  def connect(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Features `[N,P,width]` to vectors `[N,M,W]`; `keys` as `image_vectors` takes them."""
    return self.connector(features, folded(keys, 1))

  def row_vectors(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """The vectors of each row's images one after the other, `[B,I*M,W]`.

    Args:
      images: `[B,I,height,width,3]`, as `image_vectors` takes them; one that no `vector_index`
        refers to may hold anything.
      keys: `[B]` typed keys of dropout, which may be the text's.
    """
    return self._by_row(self.image_vectors, images, keys)

  def connect_rows(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`row_vectors` of images whose features `[B,I,P,width]` are known."""
    return self._by_row(self.connect, features, keys)

  def _by_row(self, encode, inputs, keys):
    """The vectors of inputs `[B,I,...]` of one image each, by row."""
    batch, num = inputs.shape[:2]
    if keys is not None:
      of_images = functools.partial(folded, folded(keys, _IMAGES))
      keys = jax.vmap(of_images, out_axes=1)(jnp.arange(num)).reshape(-1)
    vectors = encode(inputs.reshape(-1, *inputs.shape[2:]), keys)
    return vectors.reshape(batch, -1, vectors.shape[-1])

  def __call__(self, tokens: jax.Array, *args, **kwargs) -> jax.Array:
    """Hidden states `[B,S,D]`; arguments as `Transformer.__call__`.

    Its `vectors` are those of `row_vectors`.
    """
    if self.is_initializing():
      size = self.config.vision.image_size
      self.image_vectors(jnp.zeros((1, size, size, NUM_CHANNELS)))
    return self.text(tokens, *args, **kwargs)

  def logits(self, tokens: jax.Array, *args, **kwargs) -> jax.Array:
    """Next-token logits `[B,S,V] float32`; arguments as `Transformer.__call__`."""
    return self.unembed(self(tokens, *args, **kwargs))

  def extend(self, *args, **kwargs):
    """`Transformer.extend`."""
    return self.text.extend(*args, **kwargs)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """`Transformer.unembed`."""
    return self.text.unembed(hidden)

  def readout(self, hidden: jax.Array) -> jax.Array:
    """`Transformer.readout`."""
    return self.text.readout(hidden)

  def output_matrix(self) -> jax.Array:
    """`Transformer.output_matrix`."""
    return self.text.output_matrix()

  def output_bias(self) -> jax.Array | None:
    """`Transformer.output_bias`."""
    return self.text.output_bias()
