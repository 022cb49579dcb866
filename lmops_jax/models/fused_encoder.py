"""Encoder of an image and words as one sequence, with experts (VLMo, arXiv:2111.02358, section 3).

The class vector, the patches and the words attend to each other in both directions. The MLP of a
block is chosen by what stands at a position: there is one for images and one for words, and in the
last layers, `top`, a third one for both, which takes their place when image and words are there.
All layers have the first two, so that images and words are also encoded alone, as in VLMo's code.

Images become vectors as in `models.vision`, which also says how positions are interpolated. Words
have a table and learned positions; a vector of the modality is added to both, and both are normed.
Left out of VLMo: LayerScale, stochastic depth, and the norm that only words have there.

Parameters: those of a `VisionTransformer`, `word_embedding [V,D]`, `word_position_embedding
[max_words,D]`, `modality_embedding [2,D]`, and instead of a block's `mlp` the MLPs `mlp/image`,
`mlp/words` and, in `top`, `mlp/both`.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import Size, component
from lmops_jax.models import layers as layers_lib
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.dropout import dropped, folded
from lmops_jax.models.stacks import stacks, top_keys
from lmops_jax.models.transformer import Transformer
from lmops_jax.models.vision import VisionConfig, VisionTransformer


@component(module="models")
@dataclasses.dataclass(frozen=True)
class FusedEncoderConfig(VisionConfig):
  """Shape of a `FusedEncoder`: the fields of `VisionConfig`, with another meaning of two, and one.

  Attributes:
    trunk: as there; its `vocab_size` is that of the words, and its `max_length` holds the vectors
      of the largest image and `max_words`.
    top_layers: number of the last blocks that have an expert for image and words together, and
      whose parameters are a stack of their own; VLMo has 2.
    max_words: most words beside an image.

  Raises:
    ValueError: for values that do not make a model; it names the field.
  """

  max_words: Size = 128

  def __post_init__(self):
    super().__post_init__()
    longest = self.num_features() + self.max_words
    if longest > self.trunk.max_length:
      raise ValueError(
        f"models.FusedEncoderConfig.trunk.max_length={self.trunk.max_length} is below the "
        f"{longest} vectors of an image and max_words; raise it."
      )

  def module(self) -> FusedEncoder:
    """See `PictureEncoderConfig`."""
    return FusedEncoder(self)

  def num_words(self) -> int | None:
    """See `PictureEncoderConfig`."""
    return self.trunk.vocab_size

  def longest_text(self) -> int:
    """See `PictureEncoderConfig`."""
    return self.max_words

  def with_vocab_size(self, vocab_size: int) -> FusedEncoderConfig:
    """See `PictureEncoderConfig`."""
    if self.trunk.vocab_size is not None:
      return self
    trunk = dataclasses.replace(self.trunk, vocab_size=vocab_size)
    return dataclasses.replace(self, trunk=trunk)

  def example_inputs(self) -> tuple[jax.Array | None, ...]:
    """See `PictureEncoderConfig`."""
    word = jnp.zeros((1, 1), jnp.int32)
    return *super().example_inputs(), None, word, word


class Experts(nn.Module):
  """The MLPs of a block, `[N,S,D]` to same.

  Attributes:
    config: of each.
    num_images: vectors of images, in front of those of words.
    with_both: whether there is one for images and words together.
  """

  config: TransformerConfig
  num_images: int
  with_both: bool

  def setup(self):
    self.image, self.words = layers_lib.MLP(self.config), layers_lib.MLP(self.config)
    if self.with_both:
      self.both = layers_lib.MLP(self.config)

  def __call__(self, x: jax.Array) -> jax.Array:
    of_image, of_words = x[:, : self.num_images], x[:, self.num_images :]
    if self.with_both and of_image.shape[1] and of_words.shape[1]:
      if self.is_initializing():
        self.image(of_image), self.words(of_words)
      return self.both(x)
    parts = (self.image, of_image), (self.words, of_words)
    return jnp.concatenate([expert(part) for expert, part in parts if part.shape[1]], axis=1)


class FusedEncoder(VisionTransformer):
  """Images and words to vectors; see the module for its parameters."""

  config: FusedEncoderConfig

  def setup(self):
    c, trunk = self.config, self.config.trunk
    if trunk.vocab_size is None:
      raise ValueError(
        "models.FusedEncoderConfig.trunk.vocab_size is not set; take it from the vocabulary with "
        "with_vocab_size."
      )
    self._setup_images()

    def table(name, rows, axis):
      init = nn.with_logical_partitioning(
        layers_lib.table_init(trunk, trunk.width), (axis, "embed"))
      return self.param(name, init, (rows, trunk.width), jnp.dtype(trunk.param_dtype))

    self.word_embedding = table("word_embedding", trunk.vocab_size, "vocab")
    self.word_position_embedding = table("word_position_embedding", c.max_words, None)
    self.modality_embedding = table("modality_embedding", 2, None)

  def __call__(
    self, images: jax.Array | None, keys: jax.Array | None = None,
    tokens: jax.Array | None = None, segments: jax.Array | None = None,
  ) -> jax.Array:
    """Vectors after the last block, `[N,1+patches+T,D]`, not normed.

    Args:
      images: `[N,height,width,3]`, bytes, or floats that are normalised already. Without images
        there are T vectors.
      keys: `[N]` typed keys of dropout, one for each image; None drops nothing.
      tokens: `[N,T] int32`, words beside each image, or None.
      segments: `[N,T] int32`, 1 for words and 0 for padding, which none of the others see; None is
        all words.

    Raises:
      ValueError: for images of a size that the configuration does not allow, for more words than
        `max_words`, and for neither images nor words.
    """
    if images is None and tokens is None:
      raise ValueError("A FusedEncoder was given neither images nor words; give it one of them.")
    parts, segment_ids, num_images = [], None, 0
    if images is not None:
      parts.append(self.embed_images(images) + self._modality(0))
      num_images = parts[0].shape[1]
    if tokens is not None:
      parts.append(self._embed_words(tokens) + self._modality(1))
      if segments is not None:
        of_image = jnp.ones((tokens.shape[0], num_images), segments.dtype)
        segment_ids = jnp.concatenate([of_image, segments], axis=1)
    x = self.pre_norm(jnp.concatenate(parts, axis=1))
    x = self._through_experts(x, num_images, segment_ids, keys)
    if self.is_initializing():
      self.post_norm(x)
    return x

  def features(
    self, images: jax.Array | None, keys: jax.Array | None = None,
    tokens: jax.Array | None = None, segments: jax.Array | None = None,
  ) -> jax.Array:
    """All of `__call__`'s vectors, normed."""
    return self.post_norm(self(images, keys, tokens, segments))

  def _modality(self, number):
    return self.modality_embedding[number].astype(self.config.trunk.dtype)

  def _embed_words(self, tokens):
    num, most, dtype = tokens.shape[1], self.config.max_words, self.config.trunk.dtype
    if num > most:
      raise ValueError(
        f"An image has {num} words beside it and models.FusedEncoderConfig.max_words is {most}; "
        "raise it or cut them."
      )
    words = jnp.take(self.word_embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
    return words.astype(dtype) + self.word_position_embedding[:num].astype(dtype)

  @nn.compact
  def _through_experts(self, x, num_images, segment_ids, keys):
    trunk = self.config.trunk
    x = dropped(x, folded(keys, 0), trunk.embedding_dropout)
    of_stack = {"trunk": keys, "top": top_keys(keys, trunk)}
    for name, config in stacks(trunk, self.config.top_layers).items():
      make = functools.partial(Experts, num_images=num_images, with_both=name == "top")
      stack = Transformer(
        config, with_unembedding=False, with_embedding=False, make_mlp=make, name=name)
      x = stack.encode(x, None, segment_ids, of_stack[name])
    return x
