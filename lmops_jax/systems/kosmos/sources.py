"""Sources of rows: corpora of texts, of records with pictures, and of instructions.

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
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from lmops_jax.config.setting_types import Name, Positive, component
from lmops_jax.data import instance_writing, instances, packing
from lmops_jax.data.documents import Corpus, Document
from lmops_jax.data.grounded_crops import fitted
from lmops_jax.data.grounded_text import BoxWords
from lmops_jax.data.image_rows import ImageRows, write_rows
from lmops_jax.data.image_tokens import ImageTokens, encode_records
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record, sound
from lmops_jax.host.hashing import digest, order_key
from lmops_jax.systems.kosmos.prepare import RowShape
from lmops_jax.text.vocabularies import Vocabulary

_Found = TypeVar("_Found", Document, Record)


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
        f"kosmos.Pretrain.held_out={self.share} {short} of the {self.counts['others']:,} records "
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


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Texts:
  """A source of texts: a corpus of module `data`, and how often its rows come."""

  name: Name
  corpus: Corpus
  weight: Positive = 1.0

  def documents(self, side: Side) -> Iterator[Document]:
    """The documents of one side."""
    return side.of(self.corpus.documents(), lambda document: text_key(document.text))

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """See `RowSource`."""
    ids, length = form.ids, form.shape.length
    documents = packing.encoded(
      self.documents(side), form.vocabulary, line_end_id=ids.line_end_id)
    packed = packing.pack(documents, length=length, bos_id=ids.bos_id, eos_id=ids.eos_id)
    num_rows = instance_writing.write_instances(folder, packed, length=length, **{
      **instance_writing.encoded_with(form.vocabulary), "vocab_size": ids.vocab_size})
    return {"rows": num_rows}

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """See `RowSource`."""
    return instances.open_instances(folder)


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Pictures:
  """A source of records with pictures, and how often its rows come."""

  name: Name
  corpus: ImageCorpus
  weight: Positive = 1.0

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """See `RowSource`."""
    found = side.of(self.corpus.records(left_out), record_key)
    readable = sound(found, form.images, left_out)
    return _write_records(
      folder, fitted(readable, form.images, left_out), form, left_out, share=True)

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """See `RowSource`."""
    return ImageRows(folder, images)


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Instructions:
  """A source of prompts with completions, without pictures; each is a row of its own.

  Attributes:
    name: the source's.
    corpus: such as `kosmos.InstructionJsonl`, or `data.ImageJsonl` of prompts and completions.
    weight: how often its rows come.
  """

  name: Name
  corpus: ImageCorpus
  weight: Positive = 1.0

  def write(self, folder: Path, form: Form, side: Side, left_out: LeftOut) -> dict[str, int]:
    """See `RowSource`.

    Raises:
      ValueError: for a record with pictures or without a prompt.
    """
    found = side.of(map(self._checked, self.corpus.records(left_out)), record_key)
    return _write_records(folder, found, form, left_out, share=False)

  def open(self, folder: Path, images: ImageSettings) -> Rows:
    """See `RowSource`."""
    return ImageRows(folder, images)

  def _checked(self, record: Record) -> Record:
    if record.pictures or not record.num_given:
      what = f"{len(record.pictures)} pictures" if record.pictures else "no prompt"
      raise ValueError(
        f"{record.source} of the instructions {self.name!r} has {what}; give prompts with "
        "completions, and pictures to kosmos.Pretrain.pairs."
      )
    return record


def _write_records(
  folder: Path, records: Any, form: Form, left_out: LeftOut, share: bool
) -> dict[str, int]:
  pictures = form.shape.pictures
  encoded = encode_records(
    records, form.vocabulary, form.ids, words=form.box_words, left_out=left_out)
  return write_rows(
    folder, encoded, form.ids, length=form.shape.length, pictures_per_row=pictures,
    pictures_per_example=min(pictures, form.pictures_per_example), share=share,
    too_long=form.too_long)
