"""Records in tar shards as WebDataset lays them out: the files of a sample share a name.

`000/17.jpg`, `000/17.txt` and `000/17.json` one after another are the sample `000/17`: the part of
a file's own name behind the first dot tells its kind (github.com/webdataset/webdataset). Headers
and texts are read through Python's `tarfile`; for a picture only its place in the shard is kept, so
that it can be read alone later, in any order. That is why shards are not compressed.

A shard that is cut off or damaged gives what comes before the damage; the rest, and samples that
cannot be read or name pictures that they do not hold, are counted and named.
"""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmops_jax.config.setting_types import ByteCount, Text, component
from lmops_jax.data import files, matching
from lmops_jax.data.documents import document_id
from lmops_jax.data.multimodal import ImageCorpus, LeftOut, Picture, Record, parse_row
from lmops_jax.host.foreign_files import parse_json, printable, require_regular

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class _NotThere(ValueError):
  """A sample names a picture that it does not hold."""


class _Member(NamedTuple):
  """A file of a sample: its whole name in the shard, and its part of it."""

  name: str
  offset: int
  num_bytes: int


class Sample(NamedTuple):
  """A sample of a shard.

  Attributes:
    source: shard and sample. where: the same, for errors.
    row: the fields of its "json", or its text under the name that stands for "text".
    pictures: its pictures by kind, in their order.
    members: all its files by whole name.
  """

  source: str
  where: str
  row: Mapping[str, Any]
  pictures: Mapping[str, Picture]
  members: Mapping[str, Picture]


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TarShards(ImageCorpus):
  """Tar shards of samples with a text and pictures.

  Attributes:
    path: a shard, a folder (all its `.tar` files), or a pattern with `*` and `**`.
    text_member: the kind of the file with the text, "txt", "caption"; or "json", a row in one of
      the forms of `multimodal`, whose `images` name pictures of the sample by kind ("0.jpg") or
      whole name. If nothing names pictures, they are all of the sample in their order.
    picture_members: the kinds of files that are pictures, "jpg", "0.png"; () takes all files with
      the ending of one.
    text_field: the name that stands for "text" in a "json".
    max_text_bytes: a longer text is refused.
  """

  path: Text
  text_member: Text = "txt"
  text_field: Text = "text"
  picture_members: Sequence[Text] = ()
  max_text_bytes: ByteCount = dataclasses.field(default=2**26, repr=False)

  def found(self) -> matching.Found:
    """The shards, by name relative to the fixed part of the pattern, and what is not read."""
    return matching.matching(self.path, "data.TarShards.path", (".tar",))

  def fingerprint(self) -> str:
    return files.fingerprint(repr(self), self.found().files)

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    found = self.found()
    left_out.add_all(found.left_out)
    for name, path in found.files:
      for sample in self.samples(name, path, left_out):
        if record := self._record(sample, left_out):
          yield record

  def samples(self, name: str, path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """The samples of a shard with a text, and a picture unless the text is "json", in order."""
    require_regular(path)
    with path.open("rb") as contents:
      for key, members in _samples(path, left_out):
        if sample := self._sample(f"{name}:{key}", path, contents, members, left_out):
          yield sample

  def _sample(self, source, path, contents, members, left_out) -> Sample | None:
    shown, whole = printable(path), str(path.absolute())
    where = f"{shown} sample {printable(source.split(':', 1)[1])}"
    places = {
      kind: Picture(f"{shown} member {printable(m.name)}", whole, m.offset, m.num_bytes)
      for kind, m in members.items()}
    pictures = {kind: place for kind, place in places.items() if self._is_picture(kind)}
    text = members.get(self.text_member)
    if text is None or not (pictures or self.text_member == "json"):
      missing = "picture" if text else f"file of the kind {self.text_member!r}"
      left_out.add("incomplete", f"{where} has no {missing}")
      return None
    if text.num_bytes > self.max_text_bytes:
      raise ValueError(
        f"{where} has a text of {text.num_bytes:,} bytes, more than max_text_bytes="
        f"{self.max_text_bytes:,}; leave it out, or raise data.TarShards.max_text_bytes."
      )
    contents.seek(text.offset)
    data = contents.read(text.num_bytes)
    try:
      row = self._row(data, where)
    except UnicodeDecodeError:
      left_out.add("undecodable", where)
      return None
    except ValueError as error:  # others made the shard: one bad member is not its end
      left_out.add("unreadable", str(error))
      return None
    by_name = {members[kind].name: place for kind, place in places.items()}
    return Sample(source, where, row, pictures, by_name)

  def _record(self, sample: Sample, left_out: LeftOut) -> Record | None:
    by_name = {**sample.members, **sample.pictures}

    def picture_of(entry: Any, place: str) -> Picture:
      picture = by_name.get(entry) if isinstance(entry, str) else None
      if picture is None:
        raise _NotThere(
          f"{place} names the picture {printable(repr(entry))}, and the sample has "
          f"{printable(', '.join(sample.pictures)) or 'none'}"
        )
      return picture

    row = sample.row
    if "images" not in row and "parts" not in row:
      row = {**row, "images": list(sample.pictures)}
    try:
      parts, num_given = parse_row(row, sample.where, picture_of, self.text_field)
    except UnicodeEncodeError:
      left_out.add("undecodable", sample.where)
      return None
    except _NotThere as error:
      left_out.add("unreadable", str(error))
      return None
    return Record(document_id(sample.source), parts, num_given, printable(sample.source))

  def _is_picture(self, kind: str) -> bool:
    if self.picture_members:
      return kind in self.picture_members
    return kind.rsplit(".", 1)[-1] in _PICTURES

  def _row(self, data: bytes, where: str) -> Mapping[str, Any]:
    """A sample's text as a row."""
    if self.text_member != "json":
      return {self.text_field: data.decode("utf-8-sig")}
    row = parse_json(data, where)
    if not isinstance(row, dict):
      raise ValueError(f"{where} holds a {type(row).__name__}, not an object with fields.")
    return row


def _samples(path: Path, left_out: LeftOut) -> Iterator[tuple[str, dict[str, _Member]]]:
  """The samples of a shard: the name that its files share, and its files by kind."""
  key, members = None, {}
  for member in _members(path, left_out):
    folder, _, name = member.name.rpartition("/")
    stem, dot, kind = name.partition(".")
    if not stem or not dot or not kind:
      left_out.add("other_member", f"{path} member {member.name}")
      continue
    here, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
    if here != key:
      if members:
        yield key, members
      key, members = here, {}
    if kind in members:
      left_out.add("duplicate_member", f"{path} member {member.name}")
    else:
      members[kind] = member
  if members:
    yield key, members


def _members(path: Path, left_out: LeftOut) -> Iterator[_Member]:
  """The regular files of a shard; if it is damaged, those before the damage."""
  size = path.stat().st_size
  try:
    with tarfile.open(path, "r:") as shard:
      while (member := shard.next()) is not None:
        shard.members = []  # or a list of all members would grow
        if member.isreg() and not member.issparse():
          if member.offset_data + member.size > size:
            left_out.add("unreadable", f"{path} member {member.name} (the shard is cut off)")
            return
          yield _Member(member.name, member.offset_data, member.size)
        elif not member.isdir():
          left_out.add("other_member", f"{path} member {member.name}")
      end = shard.offset
  except (tarfile.TarError, OSError, EOFError) as error:
    left_out.add("unreadable", f"{path} or its rest ({error})")
    return
  with path.open("rb") as file:  # tarfile takes a damaged or missing header for the end
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
  if not mark or any(mark):
    left_out.add("unreadable", f"{path} from byte {end:,} on (no member and no mark of the end)")
