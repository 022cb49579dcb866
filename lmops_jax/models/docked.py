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

import jax

from lmops_jax.config.setting_types import component
from lmops_jax.models.around_text import AroundText, each_in_rows
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ConnectorConfig
from lmops_jax.models.dropout import folded
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import VisionConfig, VisionTransformer


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
    return self.connector.num_vectors(self.vision.num_features())


class DockedLM(AroundText):
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
    return self.as_read(features, self.config.unit_features)

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
    return each_in_rows(self.image_vectors, images, keys=keys)

  def connect_rows(self, features: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """`row_vectors` of images whose features `[B,I,P,width]` are known."""
    return each_in_rows(self.connect, features, keys=keys)

  def touch_encoders(self) -> None:
    """See `AroundText`."""
    self.image_vectors(*self.config.vision.example_inputs())
