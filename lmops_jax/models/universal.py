"""A language model that reads encoders' vectors in place of words (MetaLM, arXiv:2206.06336).

A causal decoder, the universal task layer, is the one interface of all tasks; encoders dock to it,
each through a connector (section 2). Some stretches of a text, or images in front of it, are
encoded in both directions, and the decoder reads an encoder's vector where it would have read a
word. There is no other path between them. Without encoders it is the ordinary causal model.

Parameters: `text/` (`models.transformer`); `reader/` and `reader_connector/` of text; `vision/` and
`vision_connector/` of images. MetaLM trains the decoder, the connector and, of its text encoder,
the last two layers; with `reader.encoder.top_layers=2`

    optim.partition.rules = {'reader/(?!top/).*': None, '.*': @optim.adamw()}

and with `'text/.*': None` the decoder is frozen and all else is trained (section 3.4). See
`models.stacks` on what that saves.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import component
from lmops_jax.models.around_text import AroundText, each_in_rows
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.connectors import ConnectorConfig
from lmops_jax.models.dropout import folded
from lmops_jax.models.encoders import PictureEncoderConfig, SpanEncoderConfig
from lmops_jax.models.transformer import Transformer

SPAN_INPUTS = ("encoder_tokens", "encoder_positions", "encoder_segments")
IMAGE_WORDS = ("image_tokens", "image_segments")
# Entries of a batch that `row_vectors` takes.
ENCODER_INPUTS = (*SPAN_INPUTS, "images", *IMAGE_WORDS)
_SPANS = (1 << 30) + 1  # folded into keys for spans; images have the number below


@component(module="models")
@dataclasses.dataclass(frozen=True)
class Docking:
  """An encoder of text and what leads its vectors into the decoder.

  Attributes:
    encoder: such as `encoders.TextEncoderConfig`.
    connector: one of `models.connectors` that gives a vector for each vector.
    unit_features: divide the encoder's vectors by their lengths. With a connector's own initial
      values, and an `embedding_scale` of sqrt(width), vectors then start about as large as words.
  """

  encoder: SpanEncoderConfig
  connector: ConnectorConfig
  unit_features: bool = True


@component(module="models")
@dataclasses.dataclass(frozen=True)
class ImageDocking:
  """An encoder of images and what leads its vectors into the decoder.

  Attributes:
    encoder: such as `vision.VisionConfig`, or `fused_encoder.FusedEncoderConfig`, which reads words
      beside an image.
    connector: one of `models.connectors`.
    unit_features: as in `Docking`.
  """

  encoder: PictureEncoderConfig
  connector: ConnectorConfig
  unit_features: bool = True


@component(module="models")
@dataclasses.dataclass(frozen=True)
class UniversalConfig:
  """Parts of a `UniversalLM`.

  Attributes:
    text: the decoder's; `causal` must be True.
    reader: the encoder of spans of text, or None.
    vision: the encoder of images, or None.

  Raises:
    ValueError: for parts that do not fit each other.
  """

  text: TransformerConfig
  reader: Docking | None = None
  vision: ImageDocking | None = None

  def __post_init__(self):
    if not self.text.causal:
      raise ValueError("models.UniversalConfig.text must have causal=True: it is the decoder.")
    for name, part in (("reader", self.reader), ("vision", self.vision)):
      if part is not None:
        part.connector.module(self.text, part.encoder.feature_width())
        self._check_words(name, part.encoder.num_words())
    some = 7  # any number of vectors
    if self.reader is not None and self.reader.connector.num_vectors(some) != some:
      raise ValueError(
        "models.UniversalConfig.reader.connector must give a vector for each vector, since each "
        "stands in place of its word; take models.LinearConnectorConfig or "
        "models.FeedForwardConnectorConfig."
      )

  def _check_words(self, name: str, known: int | None) -> None:
    words = self.text.vocab_size
    if known and words and known < words:
      raise ValueError(
        f"models.UniversalConfig.{name} knows {known} words and the decoder {words}; both read the "
        "same ids, so give the encoder's table as many rows."
      )

  @property
  def vocab_size(self) -> int | None:
    """V of the decoder."""
    return self.text.vocab_size

  def with_vocab_size(self, vocab_size: int) -> UniversalConfig:
    """The same with V in the decoder and in encoders whose V is open."""
    encoders = {
      name: dataclasses.replace(part, encoder=part.encoder.with_vocab_size(vocab_size))
      for name, part in (("reader", self.reader), ("vision", self.vision)) if part is not None}
    text = dataclasses.replace(self.text, vocab_size=vocab_size)
    return dataclasses.replace(self, text=text, **encoders)

  @property
  def vectors_per_image(self) -> int:
    """M, of an image of the encoder's own size without words; 0 without an encoder of images."""
    return self.vectors_of_image(0)

  def vectors_of_image(self, num_words: int) -> int:
    """M, of an image of the encoder's own size with so many words beside it, or 0."""
    if self.vision is None:
      return 0
    return self.vision.connector.num_vectors(self.vision.encoder.num_features() + num_words)


class UniversalLM(AroundText):
  """Texts with encoded spans and images in them to hidden states and logits."""

  config: UniversalConfig

  def setup(self):
    c = self.config
    self.text = Transformer(c.text)
    if c.reader is not None:
      self.reader = c.reader.encoder.module()
      self.reader_connector = c.reader.connector.module(c.text, c.reader.encoder.feature_width())
    if c.vision is not None:
      self.vision = c.vision.encoder.module()
      self.vision_connector = c.vision.connector.module(c.text, c.vision.encoder.feature_width())

  def span_vectors(
    self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """The vectors that stand for encoded words, `[N,E,W]`; arguments as `TextEncoder.features`."""
    features = self.reader.features(tokens, positions, segment_ids, folded(keys, 0))
    unit = self.config.reader.unit_features
    return self.connected(self.reader_connector, features, unit, folded(keys, 1))

  def image_vectors(
    self, images: jax.Array | None, keys: jax.Array | None = None,
    tokens: jax.Array | None = None, segments: jax.Array | None = None,
  ) -> jax.Array:
    """The vectors that stand for each image and the words encoded with it, `[N,M,W]`.

    Args:
      images: `[N,height,width,3]`, bytes, or floats that are normalised already; or None, if there
        are words alone.
      keys: `[N]` typed keys of dropout, one for each image; None drops nothing.
      tokens, segments: `[N,T] int32`, see `FusedEncoder`; None for an encoder of images alone.
    """
    words = () if tokens is None else (tokens, segments)
    features = self.vision.features(images, folded(keys, 0), *words)
    unit = self.config.vision.unit_features
    return self.connected(self.vision_connector, features, unit, folded(keys, 1))

  def row_vectors(
    self, encoder_tokens: jax.Array | None = None, encoder_positions: jax.Array | None = None,
    encoder_segments: jax.Array | None = None, images: jax.Array | None = None,
    image_tokens: jax.Array | None = None, image_segments: jax.Array | None = None,
    keys: jax.Array | None = None,
  ) -> jax.Array | None:
    """All vectors of each row, `[B,E+I*M,W]`: those of its spans, then those of its images.

    Vector m of image i is that of number `E + i*M + m`. From an encoder of images and words, and a
    connector that gives a vector for each, the class comes first, then the patches row by row, then
    the words.

    The arguments but for `keys` are entries of a batch of these names, `ENCODER_INPUTS`. A vector
    that no `vector_index` refers to may come of anything.

    Args:
      encoder_tokens, encoder_positions, encoder_segments: `[B,E] int32`, see
        `TextEncoder.features`; all three, or None.
      images: `[B,I,height,width,3]`, bytes, or floats that are normalised already; or None.
      image_tokens, image_segments: `[B,I,T] int32`, words that are encoded together with each image
        and which of them are no padding (1, otherwise 0), for an encoder that reads words; it also
        encodes words without images. Both, or None.
      keys: `[B]` typed keys of dropout, which may be the text's; None drops nothing.

    Returns:
      The vectors, `E = 0` without spans and `I = 0` without images; None without both.

    Raises:
      ValueError: for spans, images or their words without an encoder for them, and for a part of
        the arrays of spans or words.
    """
    c, spans = self.config, (encoder_tokens, encoder_positions, encoder_segments)
    words = image_tokens, image_segments
    has_spans, has_words = _all_given(SPAN_INPUTS, spans), _all_given(IMAGE_WORDS, words)
    has_images = images is not None
    _check_docked(c.reader, has_spans, "reader", SPAN_INPUTS[0])
    _check_docked(c.vision, has_images or has_words, "vision", "images")
    if has_words and c.vision.encoder.num_words() == 0:
      raise ValueError(
        "A batch has 'image_tokens' and models.UniversalConfig.vision reads no words; leave them "
        "out, or dock a models.FusedEncoderConfig."
      )
    parts = []
    if has_spans:
      parts.append(self.span_vectors(*spans, folded(keys, _SPANS)))
    if has_images or has_words:
      parts.append(each_in_rows(
        lambda images, tokens, segments, keys: self.image_vectors(images, keys, tokens, segments),
        images, *words, keys=keys))
    return jnp.concatenate(parts, axis=1) if parts else None

  def touch_encoders(self) -> None:
    """See `AroundText`."""
    c = self.config
    if c.reader is not None:
      one = jnp.zeros((1, 1), jnp.int32)
      self.span_vectors(one, one, one)
    if c.vision is not None:
      self.image_vectors(*c.vision.encoder.example_inputs())


def _all_given(names, arrays) -> bool:
  is_given = [x is not None for x in arrays]
  if any(is_given) and not all(is_given):
    missing = ", ".join(name for name, given in zip(names, is_given) if not given)
    raise ValueError(f"A batch lacks {missing}; give all of {', '.join(names)}, or none.")
  return all(is_given)


def _check_docked(docking, is_given: bool, name: str, entry: str) -> None:
  if is_given and docking is None:
    raise ValueError(
      f"A batch has {entry} and models.UniversalConfig.{name} is None; dock an encoder for them, "
      "or leave them out."
    )
