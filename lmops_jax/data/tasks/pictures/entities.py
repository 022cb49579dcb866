"""Flickr30k Entities: phrases of captions with their boxes (arXiv:1505.04870).

A folder holds `Annotations/ID.xml`, `Sentences/ID.txt` and lists of pictures, `test.txt` for
instance. As in MDETR's evaluation, and so in Kosmos-2's, an object has the names of all its
phrases, coordinates stay as they are (they begin with 1), and a phrase may be found in any of its
boxes. Phrases without boxes (scenes, what is not visible) are left out.
"""

from __future__ import annotations

import collections
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmops_jax.data.boxes import Box
from lmops_jax.data.tasks.pictures.source import Source, fields_of
from lmops_jax.data.tasks.pictures.truths import as_words, fractions
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import is_there, printable, read_bytes, read_text

PICTURES = "flickr30k-images"  # folder of the pictures beside the annotations
_PHRASE = re.compile(r"\[/EN#(?P<id>\d+)(?P<types>(?:/\w+)+) (?P<words>.*?)\](?=\s|$)")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_HINT = "give the annotations of this picture"


class Phrase(NamedTuple):
  """A phrase of a caption.

  Attributes:
    id: of what it names, the same in all captions of the picture.
    types: "people" or "clothing" for instance; sometimes several.
    before: the caption in front of it, without blanks at its ends.
    words: of the phrase.
  """

  id: str
  types: tuple[str, ...]
  before: str
  words: str


def phrase_grounding(source: Source) -> Iterator[Example | None]:
  """A row for each phrase with boxes; None for one without."""
  listed = source.file(f"{source.split}.txt")
  pictures = read_text(listed).split()
  twice = [name for name, n in collections.Counter(pictures).items() if n > 1]
  if twice:
    raise ValueError(
      f"{printable(listed)} has the picture {twice[0]} several times; list it once.")
  place = f"{PICTURES}/" if source.pictures == source.folder else ""
  for name in pictures:
    boxes = boxes_of(_there(source.folder / "Annotations" / f"{name}.xml", source))
    sentences = _there(source.folder / "Sentences" / f"{name}.txt", source)
    phrases = list(phrases_of(sentences))
    ids = {phrase.id for _, phrase in phrases} - {"0"}
    if ids and boxes and not ids & boxes.keys():
      raise ValueError(
        f"{printable(sentences)} has phrases {', '.join(sorted(ids)[:4])}, and the annotations of "
        f"{name} boxes of {', '.join(sorted(boxes)[:4])} only; give both files of one release."
      )
    for where, phrase in phrases:
      found = boxes.get(phrase.id)
      if not found or "<" in phrase.words:
        yield None
        continue
      prompt = fields_of(
        source.prompt, before=f" {phrase.before}" if phrase.before else "", phrase=phrase.words)
      yield source.example(
        f"{name}:{where}", prompt, [f"{place}{name}.jpg"], answers=[as_words(found, source.grid())],
        boxes=found, categories=phrase.types)


def phrases_of(path: Path) -> Iterator[tuple[str, Phrase]]:
  """The phrases of a file of sentences, each with its line and number, "2:0" for instance.

  Raises:
    ValueError: for markup that is none; it names file and line.
  """
  for number, line in enumerate(read_text(path).splitlines(), 1):
    before, end = "", 0
    for i, match in enumerate(_PHRASE.finditer(line)):
      before += line[end : match.start()]
      words = " ".join(match["words"].split())
      yield f"{number}:{i}", Phrase(
        match["id"], tuple(match["types"][1:].split("/")), " ".join(before.split()), words)
      before, end = before + words, match.end()
    if "[/EN#" in _PHRASE.sub("", line):
      raise ValueError(
        f"{printable(path)}:{number} has a phrase that is not of the form [/EN#ID/TYPE WORDS]; "
        "fetch the file again."
      )


def boxes_of(path: Path) -> dict[str, tuple[Box, ...]]:
  """The boxes of each phrase's id in a file of annotations, fractions of the picture.

  Raises:
    ValueError: no XML, no size, or a box that is none in the picture; it names the file.
  """
  where = printable(path)
  try:
    root = ElementTree.fromstring(read_bytes(path))
  except ElementTree.ParseError as error:
    raise ValueError(f"{where} is no XML ({error}); fetch the file again.") from error
  width, height = (_number(root, f"size/{name}", where) for name in ("width", "height"))
  found: dict[str, list] = {}
  for thing in root.iter("object"):
    corners = thing.find("bndbox")
    if corners is None:  # a scene, or what is not visible
      continue
    box = [_number(corners, name, where) for name in _CORNERS]
    names = [name.text for name in thing.findall("name") if name.text]
    if not names:
      raise ValueError(f"{where} has an object with a box and no name; fetch the file again.")
    for name in names:
      found.setdefault(name, []).append(box)
  return {name: fractions(of, width, height, where, _HINT) for name, of in found.items()}


def _number(parent: ElementTree.Element, place: str, where: str) -> float:
  text = parent.findtext(place)
  try:
    return float(text)
  except (TypeError, ValueError):
    raise ValueError(
      f"{where} has {text!r} as {place} of <{parent.tag}>; expected a number of pixels."
    ) from None


def _there(path: Path, source: Source) -> Path:
  if not is_there(path):
    raise ValueError(
      f"{printable(path)} is not there, and {source.split}.txt of the task {source.name} lists its "
      "picture; give all files of the data set."
    )
  return path
