"""Records of texts and pictures, and what the readers of all formats have in common.

A record is a sequence of texts and pictures: a picture with its caption, a document with pictures
among its text, a text alone, a question about pictures with its answer. Pictures stay where they
are, in files of their own or inside shards, until a batch needs them. Nothing is left out in
silence: `LeftOut` counts it and names the first of each kind.

A row of JSON lines or of Parquet, or the JSON of a sample in a shard, has one of these forms:

    {"images": [...], "text": "<image>A dog. <image>A cat."}         a place for each picture
    {"images": [x], "text": "A dog."}                                one picture stands in front
    {"images": [...], "prompt": "<image>What is it?", "completion": "A dog."}
    {"parts": ["A dog: ", {"image": x}, {"text": "and more"}]}       `<image>` is ordinary text here

A picture here is a path (relative to the file that names it), `{"path": ...}`, or `{"bytes": ...}`
(base64 in JSON). `images` may be one picture instead of a list, and missing if there is none.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmops_jax.data.images import ImageSettings, as_png
from lmops_jax.host.foreign_files import printable, read_bytes, require_regular
from lmops_jax.host.words import shortened

IMAGE = "<image>"  # marks the place of a picture in a text
_MAX_NAMED = 20
_BLOCK = 256  # records whose pictures are tried at a time


class Picture(NamedTuple):
  """Where the contents of a picture's file are: in a file, in a part of one, or here.

  Attributes:
    where: names it in errors.
    path: the file; "" if `data` holds the contents.
    offset, num_bytes: the part of the file; None is all of it.
    data: the contents.
  """

  where: str
  path: str = ""
  offset: int = 0
  num_bytes: int | None = None
  data: bytes = b""

  def read(self) -> bytes:
    """The contents.

    Raises:
      ValueError: if the file cannot be read, or is shorter than it was.
    """
    if not self.path:
      return self.data
    if self.num_bytes is None:
      return read_bytes(self.path)
    try:
      with open(self.path, "rb") as file:
        file.seek(self.offset)
        data = file.read(self.num_bytes)
    except OSError as error:
      raise ValueError(
        f"{printable(self.where)} cannot be read ({error.strerror or error})."
      ) from error
    if len(data) < self.num_bytes:
      raise ValueError(
        f"{printable(self.where)} ends after {len(data):,} of its {self.num_bytes:,} bytes; fetch "
        "the file again."
      )
    return data


def drawn(pixels: np.ndarray, where: str) -> Picture:
  """A picture of exactly these pixels, `[height,width,3] uint8`."""
  return Picture(where, data=as_png(pixels))


Part = str | Picture


class Record(NamedTuple):
  """Texts and pictures in order.

  Attributes:
    id: 0 <= id < 2^63, stable, as in `documents.Document`.
    parts: pictures, and texts that are never blank (but for boxes alone, see `grounded_text`) and
      have no blanks beside a picture or at the record's ends.
    num_given: how many parts at the front are a prompt, of which nothing is learned.
    source: where it was found.
  """

  id: int
  parts: tuple[Part, ...]
  num_given: int
  source: str

  @property
  def pictures(self) -> list[Picture]:
    """The pictures in order."""
    return [part for part in self.parts if not isinstance(part, str)]


@dataclasses.dataclass
class LeftOut:
  """What was left out: how many by reason, and the first of each by name.

  Reasons: "empty" (no text), "undecodable" (not UTF-8), "unreadable" (a picture, a member, or the
  rest of a shard), "incomplete" (a sample without text or without picture), "other_member" and
  "duplicate_member" (of shards); those of `WebPages`, of `grit` and of boxes (`grounded_crops`,
  `image_tokens`); for files and folders those of `matching.Found`. "animated" pictures and records
  "without_picture" are counted, not left out.
  """

  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  named: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  def add(self, reason: str, what: str) -> None:
    """Counts a thing, and keeps its name unless there are many."""
    self.counts[reason] += 1
    names = self.named.setdefault(reason, [])
    if len(names) < _MAX_NAMED:
      names.append(printable(what))

  def add_all(self, names: Mapping[str, Iterable[str]]) -> None:
    """Counts names by reason, as in `matching.Found`."""
    for reason, of_reason in names.items():
      for name in of_reason:
        self.add(reason, name)

  def merge(self, other: LeftOut) -> None:
    """Adds what another one has counted and named."""
    self.counts.update(other.counts)
    for reason, names in other.named.items():
      mine = self.named.setdefault(reason, [])
      mine += names[: _MAX_NAMED - len(mine)]

  def __str__(self) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(self.counts.items())) or "nothing"


class ImageCorpus:
  """Base of the corpora of records: a subclass reads, this class checks and counts."""

  def read(self, left_out: LeftOut) -> Iterator[Record]:
    """Yields records in an order that depends on the data only."""
    raise NotImplementedError

  def fingerprint(self) -> str:
    """Changes when the settings or the files change; pictures in files of their own are not looked
    at."""
    raise NotImplementedError

  def records(self, left_out: LeftOut | None = None) -> Iterator[Record]:
    """Yields the records that have a text, in the order of the files.

    Args:
      left_out: filled with what was left out; complete once the iterator is exhausted.

    Raises:
      ValueError: for no usable record, or a row of another form.
    """
    left_out = LeftOut() if left_out is None else left_out
    number = 0
    for record in self.read(left_out):
      if any(isinstance(part, str) for part in record.parts):
        number += 1
        if not record.pictures:
          left_out.counts["without_picture"] += 1
        yield record
      else:
        left_out.add("empty", record.source)
    if not number:
      raise ValueError(f"{self} is empty: it has no usable record ({left_out} left out).")


def sound(
  records: Iterable[Record], settings: ImageSettings, left_out: LeftOut, *, num_threads: int = 8
) -> Iterator[Record]:
  """Passes on, in order, the records whose pictures can all be read; others are "unreadable".

  Args:
    settings: those that the pictures are tried with.
    num_threads: number of threads that decode; no result depends on it.
  """
  for record, pixels in tried(records, settings, left_out.counts, num_threads=num_threads):
    fault = next((found for found in pixels if isinstance(found, str)), None)
    if fault is None:
      yield record
    else:
      left_out.add("unreadable", fault)


def tried(
  records: Iterable[Record], settings: ImageSettings, counts: Counter[str], *,
  num_threads: int = 8,
) -> Iterator[tuple[Record, list[np.ndarray | str]]]:
  """Records with their pictures' pixels, in order; a text in place of pixels says why none exist.

  Args:
    settings: those that the pictures are decoded with.
    counts: gets "animated".
    num_threads: number of threads that decode; no result depends on it.
  """
  def pixels(picture: Picture) -> tuple[np.ndarray | str, Counter[str]]:
    found = Counter()
    try:
      return settings.pixels(picture.read(), picture.where, found), found
    except ValueError as error:
      return str(error), found

  with ThreadPoolExecutor(num_threads, "pictures") as pool:
    rest = iter(records)
    while block := list(itertools.islice(rest, _BLOCK)):
      results = pool.map(pixels, [picture for record in block for picture in record.pictures])
      for record in block:
        mine = list(itertools.islice(results, len(record.pictures)))
        for _, found in mine:
          counts.update(found)
        yield record, [value for value, _ in mine]


def parse_row(
  row: Mapping[str, Any], where: str, picture_of: Callable[[Any, str], Picture],
  text_field: str = "text", images_field: str = "images",
) -> tuple[tuple[Part, ...], int]:
  """The parts of a row and how many of them are given; see the module.

  Args:
    where: file and line, for errors.
    picture_of: `(entry, where) -> Picture`, for an entry that stands for a picture.
    text_field, images_field: the names that stand for "text" and "images".

  Raises:
    ValueError: for a row of another form, or without one place for each picture.
    UnicodeEncodeError: for a text with half a character.
  """
  if row.get("parts") is not None:  # a table has the columns of all forms in every row
    return _listed_parts(row["parts"], where, picture_of), 0
  entries = row.get(images_field)
  entries = [] if entries is None else entries if isinstance(entries, list) else [entries]
  pictures = [
    picture_of(entry, f"{where} picture {i}" if len(entries) > 1 else where)
    for i, entry in enumerate(entries, 1)
  ]
  if row.get("prompt") is not None and row.get("completion") is not None:
    prompt, completion = (_text(row, field, where) for field in ("prompt", "completion"))
    return parts_of(prompt, pictures, where, completion)
  if text_field in row:
    return parts_of(_text(row, text_field, where), pictures, where)
  raise ValueError(
    f"{where} has the fields {printable(', '.join(sorted(map(str, row)))) or 'none'}; a row has "
    f'"{text_field}", "prompt" and "completion", or "parts".'
  )


def parts_of(
  text: str, pictures: Sequence[Picture], where: str, completion: str | None = None
) -> tuple[tuple[Part, ...], int]:
  """The parts of a text with a place for each picture, and how many of them are given.

  Args:
    text: a text with `IMAGE` where each picture goes; a single picture without one stands in front.
    pictures: the pictures, in order.
    where: names the text in errors.
    completion: what follows a prompt, perhaps with places too; None: the text is no prompt, and
      none of its parts are given. Its blank in front is kept, since many vocabularies join it with
      the word.

  Raises:
    ValueError: for more or fewer places than pictures.
  """
  texts = [text] if completion is None else [text, completion]
  num_places = sum(text.count(IMAGE) for text in texts)
  if num_places == 0 and len(pictures) == 1:
    texts[0] = IMAGE + texts[0]
  elif num_places != len(pictures):
    raise ValueError(
      f"{where} has {len(pictures)} pictures and its text {num_places} places {IMAGE}; give one "
      "place for each picture (a single picture without a place stands in front)."
    )
  rest = iter(pictures)
  texts[0] = texts[0].lstrip()
  texts[-1] = texts[-1].rstrip()
  parts = [[*_split(text, rest)] for text in texts]
  num_given = 0 if completion is None else len(parts[0])
  return tuple(itertools.chain(*parts)), num_given


def _split(text: str, pictures: Iterator[Picture]) -> Iterator[Part]:
  """The texts between the places of a text, and the next pictures in these places."""
  pieces = text.split(IMAGE)
  for i, piece in enumerate(pieces):
    if i:
      yield next(pictures)
      piece = piece.lstrip()
    if i < len(pieces) - 1:
      piece = piece.rstrip()
    if piece.strip():
      yield piece


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
  value = row[field]
  if value is None:
    return ""
  if not isinstance(value, str):
    raise ValueError(f"{where}: field {field!r} holds a {type(value).__name__}, not a text.")
  value.encode()  # half a character is no text
  return value


def _listed_parts(entries: Any, where: str, picture_of) -> tuple[Part, ...]:
  if not isinstance(entries, list):
    raise ValueError(f"{where}: field 'parts' holds a {type(entries).__name__}, not a list.")
  parts: list[Part] = []
  for number, entry in enumerate(entries, 1):
    place = f"{where} part {number}"
    fields = {"text": entry} if isinstance(entry, str) else entry
    if isinstance(fields, Mapping):  # a table has all columns in every entry
      fields = {name: value for name, value in fields.items() if value is not None}
    if not isinstance(fields, Mapping) or fields.keys() not in ({"text"}, {"image"}):
      raise ValueError(
        f"{place} is {shortened(repr(entry), 60)}; a part is a text, an object with \"text\", or "
        'one with "image".'
      )
    if "image" in fields:
      parts.append(picture_of(fields["image"], place))
    elif text := _text(fields, "text", place).strip():
      parts.append(text)
  return tuple(parts)


def picture_beside(folder: Path) -> Callable[[Any, str], Picture]:
  """`picture_of` for rows that name files or hold their contents.

  Args:
    folder: the folder that relative paths start from.
  """
  def picture_of(entry: Any, where: str) -> Picture:
    fields = entry if isinstance(entry, Mapping) else {
      "bytes" if isinstance(entry, bytes) else "path": entry}
    data, path = fields.get("bytes"), fields.get("path")
    if data is not None:
      return Picture(where, data=_contents(data, where))
    if not isinstance(path, str) or not path:
      raise ValueError(
        f"{where} is {shortened(repr(entry), 60)}; a picture is a path, or an object with "
        '"path" or "bytes".'
      )
    if "://" in path:
      raise ValueError(
        f"{where} names {printable(path)}, an address and no file; fetch the pictures first and "
        "name their files."
      )
    file = os.path.join(folder, os.path.expanduser(path))
    require_regular(file)
    if not os.path.isfile(file):
      raise ValueError(
        f"{where} names the picture {printable(path)}, and there is no file {printable(file)}; "
        "paths are relative to the file that names them."
      )
    return Picture(printable(file), os.path.abspath(file))
  return picture_of


def _contents(data: Any, where: str) -> bytes:
  if isinstance(data, bytes):
    return data
  try:
    return base64.b64decode(data, validate=True)
  except (binascii.Error, TypeError, ValueError) as error:
    raise ValueError(f"{where}: \"bytes\" holds no base64 ({error}).") from error
