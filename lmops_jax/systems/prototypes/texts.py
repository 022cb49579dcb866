"""Texts, or pairs of them, as an encoder of a published or trained model reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from lmops_jax.models.config import TransformerConfig
from lmops_jax.pretrained.model import PretrainedModel
from lmops_jax.pretrained.text_encoders import without_heads
from lmops_jax.systems.prototypes.encoding import Encoded, Encoder, Encoding


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
    self, texts: Sequence[str], others: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
  ) -> Encoded:
    """What the frozen layers make of texts; of pairs if `others` are given."""
    ids, seconds = ids_of(self._tokenizer, texts, others)
    return self.encoder.encode(self._lower, ids, progress=progress, seconds=seconds)


@functools.lru_cache(maxsize=4)
def encoder_of(config: TransformerConfig, settings: Encoding) -> Encoder:
  """One encoder for all that read alike."""
  return Encoder(config, settings)


def ids_of(
  tokenizer, texts: Sequence[str], others: Sequence[str] | None
) -> tuple[list[list[int]], list[int] | None]:
  """Ids of each text; of a pair those of both, the second without the token that opens a text.

  Args:
    tokenizer: the encoder's own.
    texts: any texts; an empty one has special tokens alone.
    others: the second of each pair, or None.

  Returns:
    The ids, and of pairs the places at which the second texts begin.
  """
  first = tokenizer.encode_batch(list(texts))
  if others is None:
    return first, None
  opening = tokenizer.encode("")[:1]
  second = tokenizer.encode_batch(list(others))
  ids = [a + (b[1:] if b[:1] == opening else b) for a, b in zip(first, second)]
  return ids, [len(a) for a in first]
