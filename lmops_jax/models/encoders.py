"""Encoders of text whose vectors stand in a decoder in place of words (MetaLM, arXiv:2206.06336).

The spans of a text that are encoded are packed: `<s> span <s> span ... padding` in one row of fixed
length, so that all spans of a batch take one call and hardly any padding. Attention goes both ways
and stays inside a span, positions start at 0 in each, so that a span's vectors are those it has
alone. Windows and ALiBi go by distance, which packing keeps.

The encoder of MetaLM was not published. BERT, RoBERTa and ELECTRA may stand in its place as they
are, less their heads (`encoder_params`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmops_jax.config.setting_types import Count, component
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.stacks import StackedEncoder, check_top, with_top

_HEADS = (
  "detector", "embedding_out", "head_norm", "head_transform", "pooler", "unembedding",
  "unembedding_bias")


@runtime_checkable
class SpanEncoderConfig(Protocol):
  """A kind of encoder of packed spans, and its settings."""

  def module(self) -> nn.Module:
    """The encoder, with a method `features` as `TextEncoder` has it."""

  def feature_width(self) -> int:
    """D of its vectors."""

  def num_words(self) -> int | None:
    """V of its table of words; None until a system fills it."""

  def longest_span(self) -> int:
    """Most tokens of a span, the one that opens it included."""

  def with_vocab_size(self, vocab_size: int) -> SpanEncoderConfig:
    """The same with V filled, if it was None."""


@runtime_checkable
class PictureEncoderConfig(Protocol):
  """A kind of encoder of images, and its settings; `models.vision.VisionConfig` is one.

  Some also read words beside an image, such as `models.fused_encoder.FusedEncoderConfig`.
  """

  def module(self) -> nn.Module:
    """The encoder, with a method `features(images [N,height,width,3], keys) -> [N,P,D]`.

    One that reads words takes also `tokens [N,T]` and `segments [N,T]`, and None for `images`, and
    gives the words' vectors behind those of the image.
    """

  def feature_width(self) -> int:
    """D of its vectors."""

  def num_features(self) -> int:
    """P, vectors of an image of the encoder's own size."""

  def features_of(self, height: int, width: int) -> int:
    """P of an image of that size in pixels; raises ValueError if the encoder does not take it."""

  def num_words(self) -> int | None:
    """V of its table of words, 0 if it reads none; None until a system fills it."""

  def longest_text(self) -> int:
    """Most words beside an image, or without one; 0 if it reads none."""

  def with_vocab_size(self, vocab_size: int) -> PictureEncoderConfig:
    """The same with V filled, if it was None."""

  def example_inputs(self) -> tuple[jax.Array | None, ...]:
    """Arguments of `features` for one image of that size and, if it reads words, one word."""


@component(module="models")
@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """Shape of a `TextEncoder`.

  Attributes:
    trunk: all layers, and the embeddings of words and positions; `causal` must be False. Its heads
      are left out.
    top_layers: number of its last layers whose parameters are a stack of their own, see
      `models.stacks`; MetaLM trains 2.

  Raises:
    ValueError: for values that do not make an encoder; it names the field.
  """

  trunk: TransformerConfig
  top_layers: Count = 0

  def __post_init__(self):
    if self.trunk.causal:
      raise ValueError(
        "models.TextEncoderConfig.trunk must have causal=False: all of a span is encoded at once."
      )
    check_top("models.TextEncoderConfig", self.trunk, self.top_layers)

  def module(self) -> TextEncoder:
    """See `SpanEncoderConfig`."""
    return TextEncoder(self)

  def feature_width(self) -> int:
    """See `SpanEncoderConfig`."""
    return self.trunk.width

  def num_words(self) -> int | None:
    """See `SpanEncoderConfig`."""
    return self.trunk.vocab_size

  def longest_span(self) -> int:
    """See `SpanEncoderConfig`; rows of packed spans may be longer."""
    return self.trunk.max_length

  def with_vocab_size(self, vocab_size: int) -> TextEncoderConfig:
    """See `SpanEncoderConfig`."""
    if self.trunk.vocab_size is not None:
      return self
    trunk = dataclasses.replace(self.trunk, vocab_size=vocab_size)
    return dataclasses.replace(self, trunk=trunk)


class TextEncoder(StackedEncoder):
  """Packed spans of words to vectors.

  Parameters: `trunk/embedding`, `trunk/position_embedding` and what else embeds, `trunk/layers`,
  `top/layers` with `top_layers`, and `final_norm` in the last of the stacks if the trunk has one.
  """

  config: TextEncoderConfig
  embeds_words = True

  def features(
    self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    keys: jax.Array | None = None,
  ) -> jax.Array:
    """A vector for each token, `[N,E,D]`.

    Args:
      tokens: `[N,E] int32`, each span behind the token that opens an encoder's input.
      positions: `[N,E] int32`, from 0 in each span; one beyond a table of positions, that is
        outside `longest_span`, makes the result NaN.
      segment_ids: `[N,E] int32`, equal inside a span, 0 for padding.
      keys: `[N]` typed keys of dropout, one for each row; None drops nothing.

    Raises:
      ValueError: for arrays of unequal shapes.
    """
    if not tokens.shape == positions.shape == segment_ids.shape or tokens.ndim != 2:
      raise ValueError(
        f"Spans have tokens {list(tokens.shape)}, positions {list(positions.shape)} and segments "
        f"{list(segment_ids.shape)}; give all three as [rows, encoder length]."
      )
    return self.encode(self.trunk.embed(tokens, positions), positions, segment_ids, keys)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """The vectors `[N,E,D]` of rows `[N,E]` that are one span each."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return self.features(tokens, positions, jnp.ones_like(tokens))


def encoder_params(params: Mapping[str, Any], top_layers: int = 0) -> dict[str, Any]:
  """Parameters of a `TextEncoder` from those of a `Transformer`, whose heads are left out.

  Args:
    params: of a whole model with the encoder's trunk, such as a published BERT, or
      `["discriminator"]` of replaced-token detection.
    top_layers: that of the encoder.

  Raises:
    ValueError: as `stacks.with_top` does.
  """
  encoder = {"trunk": {name: x for name, x in params.items() if name not in _HEADS}}
  return with_top(encoder, top_layers) if top_layers else encoder
