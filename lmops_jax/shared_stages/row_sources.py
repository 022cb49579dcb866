"""Sources of rows: corpora of texts, and of records with pictures. Systems name those they take.

A part of each source's records may be held out: nothing is learned from them, neither by the model
nor by the vocabulary. Which ones is a function of a record's contents (its text, or the place of
its first picture), whatever else there is, so that records of one text or of one picture, such as
the five captions of a photograph, are all held out or none.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

from lmops_jax.config.setting_types import Count, Name, Positive, PositiveInt
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.data.grounded_crops import fitted
from lmops_jax.data.grounded_text import BoxWords
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record, sound
from lmops_jax.host.hashing import digest, order_key
from lmops_jax.text.vocabularies import Vocabulary

_Found = TypeVar("_Found", Document, Record)


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Rows of one part of a group.

  Attributes:
    length: predicted positions.
    pictures: of a row, at most; 0 for texts.
    rows: in each group.
  """

  length: PositiveInt
  pictures: Count
  rows: PositiveInt


class Form(NamedTuple):
  """What records become.

  Attributes:
    shape: of the rows.
    vocabulary, ids: as `encode_records` takes them.
    images: how pictures become pixels.
    too_long, pictures_per_example: see `image_rows.write_rows`.
    box_words: the vocabulary's words for boxes; None if it has none.
  """

  shape: RowShape
  vocabulary: Vocabulary
  ids: ImageTokens
  images: ImageSettings
  too_long: str
  pictures_per_example: int
  box_words: BoxWords | None = None


class Side(NamedTuple):
  """One of the two sides of a source, held out or not.

  Attributes:
    source: the source's name, for errors.
    share: of the records that is held out.
    held: which side this is.
    counts: gets the number of records of this side as "records", of the other one as "others".
  """

  source: str
  share: float
  held: bool
  counts: Counter[str]

  def of(self, records: Iterable[_Found], key: Callable[[_Found], int]) -> Iterator[_Found]:
    """The records of this side, by their keys.

    Raises:
      ValueError: if there is none, once all records are read.
    """
    limit = self.share * 2.0**64
    for record in records:
      if (order_key(key(record)) < limit) == self.held:
        self.counts["records"] += 1
        yield record
      else:
        self.counts["others"] += 1
    if not self.counts["records"]:
      short, change = ("holds none out", "raise") if self.held else ("holds all out", "lower")
      raise ValueError(
        f"held_out={self.share} {short} of the {self.counts['others']:,} records "
        f"of {self.source}; {change} it, or set it to 0."
      )


@runtime_checkable
class RowSource(Protocol):
  """A source of the rows of one part of a group, and how often its rows come."""

  name: str
  weight: float

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """Writes the rows of one side; returns counts, "rows" among them."""

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """The rows that `write` wrote."""


def text_key(text: str) -> int:
  """By which a text is held out or not."""
  return int(digest([text], 8), 16)


def record_key(record: Record) -> int:
  """By which a record is held out or not: its first picture's place or contents, or its texts."""
  for picture in record.pictures:
    place = [Path(picture.path).name, f"\n{picture.offset}\n"]
    return int(digest([*place, picture.data], 8), 16)
  return text_key("\n".join(record.parts))


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Base of sources of texts: a corpus of module `data`, and how often its rows come."""

  name: Name
  corpus: Corpus
  weight: Positive = 1.0

  def documents(self, side: Side) -> Iterator[Document]:
    """The documents of one side."""
    return side.of(self.corpus.documents(), lambda document: text_key(document.text))


@dataclasses.dataclass(frozen=True)
class PictureSource:
  """A source of records with pictures, and how often its rows come."""

  name: Name
  corpus: ImageCorpus
  weight: Positive = 1.0

  def records(self, side: Side, left_out: LeftOut | None = None) -> Iterator[Record]:
    """The records of one side."""
    return side.of(self.corpus.records(left_out), record_key)

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """See `RowSource`."""
    readable = sound(self.records(side, left_out), form.images, left_out)
    return write_records(
      folder, fitted(readable, form.images, left_out), form, left_out, share=True)

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """See `RowSource`."""
    return ImageRows(folder, images)


def write_records(
  folder: Path, records: Iterable[Record], form: Form, left_out: LeftOut, share: bool
) -> dict[str, int]:
  """Writes records as rows of a form; `share` puts several into a row. Returns counts."""
  pictures = form.shape.pictures
  encoded = encode_records(
    records, form.vocabulary, form.ids, words=form.box_words, left_out=left_out)
  return write_rows(
    folder, encoded, form.ids, length=form.shape.length, pictures_per_row=pictures,
    pictures_per_example=min(pictures, form.pictures_per_example), share=share,
    too_long=form.too_long)
