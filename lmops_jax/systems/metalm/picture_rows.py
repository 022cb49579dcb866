"""Rows of pictures with texts, and of texts, as the docked encoders of a model read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from lmops_jax.config.setting_types import component
from lmops_jax.data import packing
from lmops_jax.data.documents import Document
from lmops_jax.data.fused_rows import ApartRows, FusedRows
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import Encoded, ImageTokens
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.multimodal import LeftOut
from lmops_jax.models.universal import UniversalConfig
from lmops_jax.shared_stages.row_sources import (
  Form,
  PictureSource,
  RowShape,
  Side,
  TextSource,
)
from lmops_jax.sizing.universal import RowShape as SizedRow
from lmops_jax.text.vocabularies import Vocabulary


@component("RowShape", module="metalm")
@dataclasses.dataclass(frozen=True)
class PairShape(RowShape):
  """Rows of one part of a group."""


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class Pairs(PictureSource):
  """A source of pictures with a text each, and how often its rows come."""


@component(module="metalm")
@dataclasses.dataclass(frozen=True)
class PlainTexts(TextSource):
  """A source of texts alone, and how often its rows come; longer ones are cut into several rows."""

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """See `RowSource`."""
    found = pieces(self.documents(side), form.vocabulary, form.ids, form.shape.length)
    return write_rows(
      folder, found, form.ids, length=form.shape.length, pictures_per_row=0,
      pictures_per_example=0, share=False)

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """See `RowSource`."""
    return ImageRows(folder, images)


def pieces(
  documents: Iterable[Document], vocabulary: Vocabulary, ids: ImageTokens, length: int
) -> Iterator[Encoded]:
  """Documents as examples of `length` predicted tokens, the last one of each shorter.

  An example begins with `<s>`, the last one of a document ends with `</s>`. One with a single
  token, of which nothing is learned, is left out.
  """
  for number, tokens in packing.encoded(documents, vocabulary):
    tokens = [*tokens, ids.eos_id]
    for start in range(0, len(tokens), length):
      piece = [ids.bos_id, *tokens[start : start + length]]
      if len(piece) > 2:
        learned = np.arange(len(piece)) > 1
        yield Encoded(
          packing.instance_id(number, start), np.array(piece, np.int32), learned,
          np.full(len(piece), -1, np.int32), ())


def check_reads_words(model: UniversalConfig, images: ImageSettings, setting: str) -> None:
  """Holds a model against rows of pictures and texts.

  Args:
    images: how pictures become pixels.
    setting: names the model in gin files.

  Raises:
    ValueError: for a model without an encoder of pictures or of words, or with two of words, for a
      connector that does not give a vector for each word, and for pictures of a size that the
      encoder does not take.
  """
  if model.vision is None:
    raise ValueError(
      f"{setting} has no encoder of pictures; dock one with models.UniversalConfig.vision.")
  fused = model.vision.encoder.longest_text() > 0
  if fused == (model.reader is not None):
    found = "two encoders of words" if fused else "no encoder of words"
    raise ValueError(
      f"{setting} has {found}; give models.UniversalConfig.vision a models.FusedEncoderConfig, "
      "which reads pictures and words, or one of pictures and a reader beside it."
    )
  num = model.vision.encoder.features_of(images.height, images.width)
  if fused and model.vision.connector.num_vectors(num) != num:
    raise ValueError(
      "models.UniversalConfig.vision.connector must give a vector for each vector, since words "
      "are among them; take models.LinearConnectorConfig or models.FeedForwardConnectorConfig."
    )


def positions_of_words(model: UniversalConfig) -> int:
  """Most positions of a text that is read, its start token included."""
  if model.reader is None:
    return model.vision.encoder.longest_text()
  return model.reader.encoder.longest_span()


def read_by(model: UniversalConfig, rows: Rows, num_slots: int) -> Rows:
  """Rows as the model's encoders read them.

  Args:
    model: see `check_reads_words`.
    rows: `PrefixRows` or `PictureSpans`.
    num_slots: vectors of a picture.
  """
  if model.reader is not None:
    return ApartRows(rows)
  return FusedRows(rows, num_slots, positions_of_words(model))


def vectors_of_picture(model: UniversalConfig, images: ImageSettings) -> int:
  """Vectors that the decoder reads of a picture."""
  features = model.vision.encoder.features_of(images.height, images.width)
  return model.vision.connector.num_vectors(features)


def row_shape(
  model: UniversalConfig, length: int, pictures: int, images: ImageSettings
) -> SizedRow:
  """The shape of rows that `read_by` gives.

  Args:
    length: S. pictures: I, 0 for texts alone. images: how pictures become pixels.
  """
  features = model.vision.encoder.features_of(images.height, images.width)
  if model.reader is not None:
    return SizedRow(length, length, images=pictures, image_features=features)
  return SizedRow(
    length, images=pictures or 1, image_words=positions_of_words(model),
    image_features=features if pictures else 0)
