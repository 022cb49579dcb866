"""Records of texts and pictures in JSON lines and Parquet files of the user's own.

The forms of a row are those of `multimodal`. Ids are those of `files`: a hash of the file's path,
relative to the part of the pattern without wildcards, and of the row; or a field of the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.documents import document_id, given_id
from lmops_jax.data.lines import jsonl_rows
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Record, parse_row, picture_beside
from lmops_jax.host.foreign_files import printable

_ROWS = 64  # of a table at a time, which may hold their pictures


@dataclasses.dataclass(frozen=True)
class _ImageFiles(ImageCorpus):
  """Corpora whose `path` is a file, a folder or a pattern."""

  path: Text
  text_field: Text = "text"
  images_field: Text = "images"
  id_field: Text | None = None

  def found(self) -> matching.Found:
    """The files, by name relative to the fixed part of the pattern, and what is not read."""
    raise NotImplementedError

  def rows(self, path: Path, left_out: LeftOut) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of one of the files and their numbers, from 1."""
    raise NotImplementedError

  def fingerprint(self) -> str:
    return files.fingerprint(repr(self), self.found().files)

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    found = self.found()
    left_out.add_all(found.left_out)
    for name, path in found.files:
      picture_of = picture_beside(path.parent)
      for number, row in self.rows(path, left_out):
        where, source = f"{printable(path)}:{number}", f"{name}:{number}"
        try:
          parts, num_given = parse_row(
            row, where, picture_of, self.text_field, self.images_field)
        except UnicodeEncodeError:
          left_out.add("undecodable", where)
          continue
        identifier = document_id(source)
        if self.id_field is not None:
          files.check_field(row, self.id_field, where, f"data.{type(self).__name__}.id_field")
          identifier = given_id(row[self.id_field], where, self.id_field)
        yield Record(identifier, parts, num_given, printable(source))


@component(module="data")
@dataclasses.dataclass(frozen=True)
class ImageJsonl(_ImageFiles):
  """JSON lines of texts and pictures, plain or compressed (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`).

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
    text_field, images_field: names of the fields.
    id_field: a field with the id; None: a hash of file and line.
  """

  def found(self):
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst")
    return matching.matching(self.path, "data.ImageJsonl.path", endings)

  def rows(self, path, left_out):
    return jsonl_rows(path, left_out.counts)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class ImageParquet(_ImageFiles):
  """Parquet files of texts and pictures: paths, or the pictures' contents.

  Attributes:
    path: a file, a folder (all its `.parquet` files), or a pattern with `*` and `**`.
    text_field, images_field: names of the columns.
    id_field: a column with the id; None: a hash of file and row.
  """

  def found(self):
    return matching.matching(self.path, "data.ImageParquet.path", (".parquet",))

  def rows(self, path, left_out):
    import pyarrow
    import pyarrow.parquet

    wanted = {"parts", "prompt", "completion", self.text_field, self.images_field, self.id_field}
    shown, number = printable(path), 0
    try:
      with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        names = file.schema_arrow.names
        columns = [name for name in names if name in wanted]
        if "parts" not in names and not {"prompt", "completion"} <= set(names):
          files.check_field(names, self.text_field, shown, "data.ImageParquet.text_field")
        if self.images_field != "images":
          files.check_field(names, self.images_field, shown, "data.ImageParquet.images_field")
        for batch in file.iter_batches(_ROWS, columns=columns):
          for row in range(batch.num_rows):
            number += 1
            try:
              yield number, {name: batch.column(name)[row].as_py() for name in columns}
            except UnicodeDecodeError:
              left_out.add("undecodable", f"{shown}:{number}")
    except (OSError, pyarrow.ArrowException) as error:
      raise ValueError(f"{shown} cannot be read as Parquet: {printable(error)}.") from error
