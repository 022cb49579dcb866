"""Records in tar shards as WebDataset lays them out: the files of a sample share a name.

`000/17.jpg`, `000/17.txt` and `000/17.json` one after another are the sample `000/17`: what follows
the first dot of a file's own name tells its kind (github.com/webdataset/webdataset). Headers and
texts are read through Python's `tarfile`; of a picture its place in the shard is kept, so that any
picture can be read alone later, in any order. That is why shards are not compressed.

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


@component(module="data")
@dataclasses.dataclass(frozen=True)
class TarShards(ImageCorpus):
  """Tar shards of samples with a text and pictures.

  Attributes:
    path: a shard, a folder (all its `.tar` files), or a pattern with `*` and `**`.
    text_member: the kind of the file with the text, "txt", "caption"; of "json" the row in one of
      the forms of `multimodal`, whose `images` name pictures of the sample by kind ("0.jpg") or
      whole name. Where nothing names pictures, they are all of the sample in their order.
    picture_members: the kinds of files that are pictures, "jpg", "0.png"; () takes what ends like
      one.
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
      require_regular(path)
      with path.open("rb") as contents:
        for key, members in _samples(path, left_out):
          if record := self._record(f"{name}:{key}", path, contents, members, left_out):
            yield record

  def _record(self, source, path, contents, members, left_out) -> Record | None:
    where = f"{printable(path)} sample {printable(source.split(':', 1)[1])}"
    pictures = {kind: m for kind, m in members.items() if self._is_picture(kind)}
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
      row = self._row(data, where, pictures)
    except UnicodeDecodeError:
      left_out.add("undecodable", where)
      return None
    except ValueError as error:  # of a shard that others made, a bad member is not the end
      left_out.add("unreadable", str(error))
      return None

    by_name = {m.name: m for m in members.values()} | pictures

    def picture_of(entry: Any, place: str) -> Picture:
      member = by_name.get(entry) if isinstance(entry, str) else None
      if member is None:
        raise _NotThere(
          f"{place} names the picture {printable(repr(entry))}, and the sample has "
          f"{printable(', '.join(pictures)) or 'none'}"
        )
      return Picture(
        f"{printable(path)} member {printable(member.name)}", str(path.absolute()),
        member.offset, member.num_bytes)

    try:
      parts, num_given = parse_row(row, where, picture_of, self.text_field)
    except UnicodeEncodeError:
      left_out.add("undecodable", where)
      return None
    except _NotThere as error:
      left_out.add("unreadable", str(error))
      return None
    return Record(document_id(source), parts, num_given, printable(source))

  def _is_picture(self, kind: str) -> bool:
    if self.picture_members:
      return kind in self.picture_members
    return kind.rsplit(".", 1)[-1] in _PICTURES

  def _row(self, data: bytes, where: str, pictures: Mapping[str, _Member]) -> Mapping[str, Any]:
    """A sample as a row."""
    if self.text_member != "json":
      return {self.text_field: data.decode("utf-8-sig"), "images": list(pictures)}
    row = parse_json(data, where)
    if not isinstance(row, dict):
      raise ValueError(f"{where} holds a {type(row).__name__}, not an object with fields.")
    return row if "images" in row or "parts" in row else {**row, "images": list(pictures)}


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
  """The regular files of a shard; where it is damaged, what comes before."""
  size = path.stat().st_size
  try:
    with tarfile.open(path, "r:") as shard:
      while (member := shard.next()) is not None:
        shard.members = []  # else a list of all members grows
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
  with path.open("rb") as file:  # tarfile takes a damaged header, or none, for the end
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
  if not mark or any(mark):
    left_out.add("unreadable", f"{path} from byte {end:,} on (no member and no mark of the end)")
