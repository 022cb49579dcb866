"""Sources of rows: corpora of texts, of records with pictures, and of instructions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lmops_jax.config.setting_types import Name, Positive, component
from lmops_jax.data import instance_writing, instances, packing
from lmops_jax.data.image_rows import ImageRows
from lmops_jax.data.images import ImageSettings
from lmops_jax.data.mixture import Rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record
from lmops_jax.shared_stages.row_sources import (
  Form,
  PictureSource,
  Side,
  TextSource,
  record_key,
  write_records,
)


@component(module="kosmos")
@dataclasses.dataclass(frozen=True)
class Texts(TextSource):
  """A source of texts: a corpus of module `data`, and how often its rows come."""

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
class Pictures(PictureSource):
  """A source of records with pictures, and how often its rows come."""


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
    return write_records(folder, found, form, left_out, share=False)

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
