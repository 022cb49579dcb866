"""Texts, or pairs of them, as an encoder of a published or trained model reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.text_encoders import without_heads
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder, Encoding

Input = str | tuple[str, str]


class TextReader:
  """A model on disk as an encoder of texts.

  Attributes:
    encoder: the same object for equal models and settings, so that runs share programs.
    top: parameters of its trained layers as published, {} if there are none.
  """

  def __init__(self, source: PretrainedModel, settings: Encoding, partitioner=None):
    self.encoder = encoder_of(without_heads(source.config), settings)
    self._lower, self.top = self.encoder.split(source.params(partitioner))
    self._tokenizer = source.tokenizer()

  def read(
    self, inputs: Sequence[Input], progress: Callable[[int], None] | None = None
  ) -> Encoded:
    """What the frozen layers make of texts, or of pairs of them."""
    most = self.encoder.settings.max_tokens
    given = [inputs, None] if isinstance(inputs[0], str) else list(zip(*inputs))
    ids, types = self._tokenizer.encode_typed(*given)
    long = [i for i, row in enumerate(ids) if len(row) > most]
    if long:
      given = [part and [part[i] for i in long] for part in given]
      for i, *cut in zip(long, *self._tokenizer.encode_typed(*given, most=most)):
        ids[i], types[i] = cut
    return self.encoder.encode(self._lower, ids, types, progress)._replace(num_cut=len(long))


@functools.lru_cache(maxsize=4)
def encoder_of(config: TransformerConfig, settings: Encoding) -> Encoder:
  """One encoder for all that read alike."""
  return Encoder(config, settings)


def shown(given: Input) -> str:
  """An input on one line."""
  return " ".join((given if isinstance(given, str) else " / ".join(given)).split())
