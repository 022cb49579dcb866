"""Where the reader's parameters come from: training of its own, or a published encoder.

Only configurations are read to tell whether a published encoder fits; weights are read when the
decoder's training begins.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lmops_jax.config.setting_types import Text, component
from lmops_jax.models.encoders import TextEncoderConfig
from lmops_jax.pretrained import model as model_lib
from lmops_jax.pretrained.text_encoders import check_text_encoder, text_encoder_params
from lmops_jax.stages import pipeline
from lmops_jax.systems.metalm.texts import Prepared
from lmops_jax.text.vocabularies import Vocabulary


@runtime_checkable
class ReaderStart(Protocol):
  """What makes the parameters that the reader starts from, as the stage `encoder`."""

  def check(self, encoder: TextEncoderConfig) -> None:
    """Raises ValueError for an encoder that it cannot start; nothing has been computed yet.

    Args:
      encoder: `vocab_size` is None if it is to come from the vocabulary.
    """

  def run(
    self, context: pipeline.StageContext, encoder: TextEncoderConfig, prepared: Prepared, *,
    seed: int, partitioner,
  ) -> None:
    """The stage; `context.extra["tested"]` gets figures of the encoder by name.

    Args:
      encoder: with a vocabulary size.
      prepared: the run's texts.
    """

  def load(
    self, folder: Path, encoder: TextEncoderConfig, vocabulary: Vocabulary, partitioner
  ) -> Any:
    """The parameters, as a `UniversalLM` has them under `reader`; `folder` is the stage's."""


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class PublishedReader:
  """A published encoder: a folder of BERT, RoBERTa or ELECTRA, or a model that was trained here.

  The decoder reads the same ids, so the run's vocabulary must be the encoder's.

  Attributes:
    path: what `pretrained.load` takes. The encoder is to be `@pretrained.text_encoder()` of it, or
      one with the same settings.
  """

  path: Text

  def fingerprint(self) -> str:
    """A hash of the encoder's files."""
    return model_lib.load(self.path).fingerprint()

  def check(self, encoder: TextEncoderConfig) -> None:
    """See `ReaderStart`."""
    check_text_encoder(self.path, encoder)

  def run(
    self, context: pipeline.StageContext, encoder: TextEncoderConfig, prepared: Prepared, *,
    seed: int, partitioner,
  ) -> None:
    """See `ReaderStart`; nothing is trained.

    Raises:
      ValueError: for another vocabulary than the encoder's.
    """
    found = model_lib.load(self.path).tokenizer().vocabulary(context.directory / "vocabulary")
    if found.fingerprint != prepared.vocabulary.fingerprint:
      raise ValueError(
        "the texts have another vocabulary than the encoder in metalm.PublishedReader.path="
        f"{self.path!r}; take its own, @data.ModelTokenizer() of the same path."
      )
    context.extra["tested"] = {}

  def load(
    self, folder: Path, encoder: TextEncoderConfig, vocabulary: Vocabulary, partitioner
  ) -> Any:
    """See `ReaderStart`."""
    return text_encoder_params(self.path, encoder, partitioner)
