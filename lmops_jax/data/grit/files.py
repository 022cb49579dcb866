"""GrIT in files: shards as img2dataset writes them, and JSON lines beside a folder of pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmops_jax.config.setting_types import Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.documents import document_id, given_id
from lmops_jax.data.grit.records import GritRow, as_row, parse
from lmops_jax.data.lines import ENDINGS, jsonl_rows
from lmops_jax.data.multimodal import LeftOut, Picture, picture_beside
from lmops_jax.data.tar_shards import TarShards
from lmops_jax.host.foreign_files import printable
from lmops_jax.host.whole_files import replacing

_PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp")


class GritExample(NamedTuple):
  """A row of GrIT with its picture.

  Attributes:
    id: 0 <= id < 2^63, stable: the row's own, or a hash of where it stands.
    row: the caption and its regions.
    picture: where the picture is.
    source: where the row was found.
  """

  id: int
  row: GritRow
  picture: Picture
  source: str


class GritCorpus:
  """Base of the corpora of GrIT's rows, with boxes or to find boxes for."""

  def found(self) -> matching.Found:
    """The files, by name relative to the fixed part of the pattern, and what is not read."""
    raise NotImplementedError

  def read_file(self, name: str, path: Path, left_out: LeftOut) -> Iterator[GritExample]:
    """The rows of one of the files with a picture, in order."""
    raise NotImplementedError

  def examples(self, left_out: LeftOut) -> Iterator[GritExample]:
    """The rows with a picture, in the order of the files.

    Args:
      left_out: gets what is left out, see `records.parse`; rows "without_file" name a picture that
        is not there, as pages on the web go.
    """
    found = self.found()
    left_out.add_all(found.left_out)
    for name, path in found.files:
      yield from self.read_file(name, path, left_out)

  def pieces(self) -> list[Piece]:
    """A piece for each file, for readers side by side."""
    return [Piece(self, name, path.absolute()) for name, path in self.found().files]

  def fingerprint(self) -> str:
    """Changes when the settings or the files change; pictures in files of their own are not looked
    at."""
    return files.fingerprint(repr(self), self.found().files)


class Piece(NamedTuple):
  """A file of a corpus, whose examples have the ids and sources that they have in the whole."""

  corpus: GritCorpus
  name: str
  path: Path

  def examples(self, left_out: LeftOut) -> Iterator[GritExample]:
    """See `GritCorpus.read_file`."""
    return self.corpus.read_file(self.name, self.path, left_out)


@component(module="data")
@dataclasses.dataclass(frozen=True)
class GritShards(GritCorpus):
  """GrIT in tar shards: `0001.jpg` and `0001.json` are a sample.

  Samples that cannot be read or are of another form are "unreadable", counted and named.

  Attributes:
    path: a shard, a folder (all its `.tar` files), or a pattern with `*` and `**`.
  """

  path: Text

  def found(self):
    return matching.matching(self.path, "data.GritShards.path", (".tar",))

  def read_file(self, name, path, left_out):
    for sample in TarShards(self.path, text_member="json").samples(name, path, left_out):
      if not sample.pictures:
        left_out.add("without_file", f"{sample.where} has no picture")
        continue
      try:
        row = parse(sample.row, sample.where, left_out)
        identifier = _identifier(row, sample.source, sample.where)
      except UnicodeEncodeError:
        left_out.add("undecodable", sample.where)
        continue
      except ValueError as error:  # others made the shard: one bad member is not its end
        left_out.add("unreadable", str(error))
        continue
      picture = next(iter(sample.pictures.values()))
      yield GritExample(identifier, row, picture, printable(sample.source))


@component(module="data")
@dataclasses.dataclass(frozen=True)
class GritJsonl(GritCorpus):
  """GrIT in JSON lines; a row's picture is the path in its field "image", or named by its id.

  Attributes:
    path: a file, a folder (all its JSON lines files), or a pattern with `*` and `**`.
    pictures: the folder with the pictures: paths in "image" are relative to it, and without that
      field a row's picture is `<id>.jpg` (or .jpeg, .png, .webp). None: the folder of the file.
  """

  path: Text
  pictures: Text | None = None

  def found(self):
    return matching.matching(self.path, "data.GritJsonl.path", ENDINGS)

  def read_file(self, name, path, left_out):
    folder = Path(os.path.expanduser(self.pictures)) if self.pictures else path.parent
    for number, fields in jsonl_rows(path, left_out.counts):
      where, source = f"{printable(path)}:{number}", f"{name}:{number}"
      try:
        row = parse(fields, where, left_out)
      except UnicodeEncodeError:
        left_out.add("undecodable", where)
        continue
      picture = _picture(row, folder, where)
      if picture is None:
        left_out.add("without_file", where)
      else:
        yield GritExample(_identifier(row, source, where), row, picture, printable(source))


def _identifier(row: GritRow, source: str, where: str) -> int:
  return document_id(source) if row.id is None else given_id(row.id, where, "id")


def _picture(row: GritRow, folder: Path, where: str) -> Picture | None:
  """The picture of a row; None if its file is not there."""
  if (entry := row.others.get("image")) is not None:
    if isinstance(entry, str) and "://" not in entry and not os.path.lexists(
      os.path.join(folder, os.path.expanduser(entry))):
      return None
    return picture_beside(folder)(entry, where)
  if row.id is None:
    raise ValueError(
      f'{where} has neither "image" nor "id"; a picture is found by one of them.'
    )
  for ending in _PICTURE_ENDINGS:
    name = f"{row.id}.{ending}"
    if os.path.lexists(folder / name):
      return picture_beside(folder)(name, where)
  return None


def write_jsonl(path: Path | str, rows: Iterable[GritRow]) -> int:
  """Writes rows as JSON lines, whole or not at all; returns how many."""
  number = 0
  with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(as_row(row), allow_nan=False) + "\n")
      number += 1
  return number


def write_shard(path: Path | str, examples: Iterable[GritExample]) -> int:
  """Writes rows with their pictures as a tar shard, whole or not at all; returns how many.

  Equal examples give equal bytes. The files of an example are named by its number in the shard.

  Raises:
    ValueError: if a picture cannot be read, or is in no format that shards hold.
  """
  number = 0
  with replacing(Path(path)) as partial, tarfile.open(partial, "w") as shard:
    def add(name: str, data: bytes) -> None:
      member = tarfile.TarInfo(name)
      member.size = len(data)
      shard.addfile(member, io.BytesIO(data))

    for example in examples:
      data = example.picture.read()
      text = json.dumps(as_row(example.row), allow_nan=False)
      add(f"{number:09d}.{_ending(data, example.picture.where)}", data)
      add(f"{number:09d}.txt", example.row.caption.encode())
      add(f"{number:09d}.json", text.encode())
      number += 1
  return number


def _ending(data: bytes, where: str) -> str:
  """The ending of the name of a picture with these contents."""
  starts = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp",
            b"II*\0": "tif", b"MM\0*": "tif"}
  if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
    return "webp"
  for start, ending in starts.items():
    if data.startswith(start):
      return ending
  raise ValueError(
    f"{printable(where)} is no JPEG, PNG, WebP, GIF, BMP or TIFF; convert it, or leave it out."
  )
