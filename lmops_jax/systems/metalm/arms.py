"""The objectives that are compared, each a model and the spans that it is trained with.

- causal: a decoder alone.
- causal_large: a decoder with about as many parameters as the other decoder and its encoder.
- prefix: the decoder reads the start of each row through the encoder (a prefix language model).
- semi_causal: it reads random spans through the encoder (MetaLM, arXiv:2206.06336, section 2.2).

The decoders of all but causal_large start from the same numbers, and all arms read the same rows in
the same order.
"""

from __future__ import annotations

import dataclasses

from lmops_jax.config.setting_types import component
from lmops_jax.data.instances import Instances
from lmops_jax.data.span_rows import SpanRows
from lmops_jax.data.spans import NoSpans, SpanSampler
from lmops_jax.models.config import TransformerConfig
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.models.universal import UniversalConfig, UniversalLM

CAUSAL, LARGE, PREFIX, SEMI = "causal", "causal_large", "prefix", "semi_causal"
ARMS = (CAUSAL, LARGE, PREFIX, SEMI)
_SPANS_SEED = 1  # of spans of validation rows, the same for all seeds


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Models:
  """What the arms are made of; vocabulary sizes come from the vocabulary.

  Attributes:
    docked: decoder and the reader docked to it, whose encoder is a `models.TextEncoderConfig`, of
      the arms prefix and semi_causal; the decoder alone is the arm causal.
    large: the decoder of the arm causal_large.
    prefix: spans of the arm prefix, such as `@data.PrefixSpan()`.
    spans: spans of the arm semi_causal, such as `@data.RandomSpans()`.

  Raises:
    ValueError: for a model without a reader, or with images.
  """

  docked: UniversalConfig
  large: TransformerConfig
  prefix: SpanSampler
  spans: SpanSampler

  def __post_init__(self):
    if self.docked.reader is None or self.docked.vision is not None:
      raise ValueError(
        "metalm.Models.docked must have a reader and no vision: the arms differ in who reads text."
      )

  def arm(self, name: str, vocab_size: int | None) -> Arm:
    """An arm by its name; without a vocabulary size it cannot be trained yet."""
    text = self.large if name == LARGE else self.docked.text
    config = UniversalConfig(dataclasses.replace(text, vocab_size=vocab_size))
    if name in (PREFIX, SEMI):
      config = dataclasses.replace(config, reader=dataclasses.replace(
        self.docked.reader, encoder=sized_encoder(self.docked.reader.encoder, vocab_size)))
    sampler = {PREFIX: self.prefix, SEMI: self.spans}.get(name, NoSpans())
    return Arm(config, sampler)


def sized_encoder(encoder: TextEncoderConfig, vocab_size: int | None) -> TextEncoderConfig:
  """An encoder for a vocabulary, behind which it has a word more, the mask.

  A published one, whose words are known, stays as it is.
  """
  return encoder if vocab_size is None else encoder.with_vocab_size(vocab_size + 1)


def sized(model: UniversalConfig, vocab_size: int) -> UniversalConfig:
  """A model for a vocabulary, if it has no more words of its own.

  Raises:
    ValueError: for a model with fewer words of its own.
  """
  own, reader, vision = model.vocab_size, model.reader, model.vision
  if own is not None and own < vocab_size:
    raise ValueError(
      f"the vocabulary has {vocab_size} ids and text/models.TransformerConfig.vocab_size is "
      f"{own}; leave it out, or use the model's own vocabulary."
    )
  if reader is not None:
    reader = dataclasses.replace(reader, encoder=sized_encoder(reader.encoder, vocab_size))
  if vision is not None:
    vision = dataclasses.replace(vision, encoder=vision.encoder.with_vocab_size(vocab_size))
  text = dataclasses.replace(model.text, vocab_size=own or vocab_size)
  return dataclasses.replace(model, text=text, reader=reader, vision=vision)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One objective.

  Attributes:
    config: of the model; it has a reader if spans are encoded.
    sampler: chooses the spans of a row.
  """

  config: UniversalConfig
  sampler: SpanSampler

  @property
  def reads_spans(self) -> bool:
    """Whether it has an encoder."""
    return self.config.reader is not None

  @property
  def model(self) -> UniversalLM:
    """The model."""
    return UniversalLM(self.config)

  def rows(self, instances: Instances, seed: int) -> SpanRows:
    """Rows with spans drawn by a seed.

    Raises:
      ValueError: for rows that are too short for spans, or spans too long for the encoder.
    """
    positions = self.config.reader.encoder.trunk.max_length if self.reads_spans else None
    return SpanRows(instances, self.sampler, seed, encoder_positions=positions)

  def validation(self, instances: Instances) -> SpanRows:
    """Rows whose spans are the same for all seeds."""
    return self.rows(instances, _SPANS_SEED)
