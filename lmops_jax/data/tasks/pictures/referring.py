"""Referring expressions of RefCOCO, RefCOCO+ and RefCOCOg, in MDETR's JSON (arXiv:2104.12763).

Each expression is an entry of `images` with its caption, and a box (x, y, width, height) of
`annotations`. Pictures are those of COCO 2014, whose names tell their folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pydantic
from annotated_types import Len

from lmops_jax.data.boxes import Box, from_corner_and_size
from lmops_jax.data.tasks.pictures.source import Source, fields_of
from lmops_jax.data.tasks.pictures.truths import as_words, fractions
from lmops_jax.data.tasks.task import Example
from lmops_jax.host.foreign_files import checked, printable, read_json

_PART = re.compile(r"COCO_((?:train|val|test)20\d\d)_")
_HINT = (
  "boxes are (x, y, width, height) in pixels; if these are (x1, y1, x2, y2), subtract the corner")


class _Picture(pydantic.BaseModel):
  id: int
  file_name: str
  width: int
  height: int
  caption: str


class _Annotation(pydantic.BaseModel):
  image_id: int
  bbox: Annotated[list[float], Len(4, 4)]


class _Expressions(pydantic.BaseModel):
  images: list[_Picture]
  annotations: list[_Annotation]


class Expression(NamedTuple):
  """An expression and what it refers to.

  Attributes:
    id: of the entry.
    picture: path of its picture.
    words: the expression.
    boxes: fractions of the picture.
  """

  id: int
  picture: str
  words: str
  boxes: tuple[Box, ...]


def comprehension(source: Source, data: str) -> Iterator[Example | None]:
  """A row for each expression, whose box is asked for; None for one without box.

  Args:
    source: the folder.
    data: "refcoco", "refcoco+" or "refcocog".
  """
  for found in _expressions(source, data):
    if not found.boxes or "<" in found.words:
      yield None
      continue
    yield source.example(
      str(found.id), fields_of(source.prompt, phrase=found.words), [found.picture],
      answers=[as_words(found.boxes)], boxes=found.boxes)


def description(source: Source, data: str) -> Iterator[Example | None]:
  """A row for each box, whose expressions are the right answers; None for one without box."""
  of_box: dict[tuple, list[Expression]] = {}
  for found in _expressions(source, data):
    of_box.setdefault((found.picture, found.boxes), []).append(found)
  for (picture, boxes), members in of_box.items():
    if not boxes:
      yield from [None] * len(members)
      continue
    yield source.example(
      str(members[0].id), fields_of(source.prompt, boxes=as_words(boxes)), [picture],
      answers=[member.words for member in members])


def _expressions(source: Source, data: str) -> Iterator[Expression]:
  path = source.file(f"*{data}_{source.split}.json")
  found = checked(_Expressions, read_json(path), path)
  boxes: dict[int, list] = {image.id: [] for image in found.images}
  if len(boxes) < len(found.images):
    raise ValueError(
      f"{printable(path)} has {len(found.images)} images and {len(boxes)} different ids of them; "
      "give each expression an entry of its own."
    )
  for annotation in found.annotations:
    if annotation.image_id not in boxes:
      raise ValueError(
        f"{printable(path)} has a box of the image {annotation.image_id}, which is not among its "
        "images; give the file of one split."
      )
    boxes[annotation.image_id].append(annotation.bbox)
  for image in found.images:
    where = f"{printable(path)}: image {image.id}"
    corners = from_corner_and_size(boxes[image.id])
    yield Expression(
      image.id, _place(source.pictures, image.file_name), " ".join(image.caption.split()),
      fractions(corners, image.width, image.height, where, _HINT))


def _place(pictures: Path, name: str) -> str:
  """Where a picture of COCO is: in its part's folder, if there is one."""
  part = _PART.match(name)
  return f"{part[1]}/{name}" if part and (pictures / part[1]).is_dir() else name
