"""Boxes that a row gives to the phrases of its text, in the unit that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from lmops_jax.data.boxes import PHRASE, Box, checked, from_pixels, insert
from lmops_jax.data.multimodal import IMAGE
from lmops_jax.host.words import shortened

Size = tuple[int, int]  # width and height of a picture, in pixels
LAST_PHRASE = re.compile(r"<phrase>([^<]+)</phrase>\s*$")  # of a prompt that asks for its boxes


def with_boxes(
  text: str, entries: Sequence[Any], unit: str, num_pictures: int, size_of: Callable[[int], Size],
  grid: int, where: str,
) -> str:
  """A text with boxes behind its phrases.

  Args:
    text: with `<image>` for each picture; without any, the pictures stand in front.
    entries: for each phrase nothing, a box, or several, see `boxes.insert`.
    unit: "fractions", "pixels", those of the last picture in front of the phrase, or "cells".
    num_pictures: of the text.
    size_of: of a picture by its number; asked for boxes in pixels only.
    grid: the side of the model's grid.
    where: names the boxes in errors.

  Raises:
    ValueError: as `boxes.insert`; boxes of another unit; or pixels of a phrase with no picture in
      front.
  """
  boxes, starts = list(entries), [match.start() for match in PHRASE.finditer(text)]
  for i, entry in enumerate(boxes):
    place = f"{where}[{i}]"
    _check_width(_listed(entry), unit, place)
    if unit == "pixels" and _listed(entry) and i < len(starts):  # else `insert` tells what is wrong
      number = picture_in_front(text[: starts[i]], text, num_pictures, place)
      boxes[i] = _fractions(_listed(entry), size_of(number), place)
  return insert(text, boxes, grid, where=where)


def true_boxes(entry: Any, unit: str, size: Callable[[], Size], where: str) -> tuple[Box, ...]:
  """One box or several as fractions of their picture, none for an empty list.

  Args:
    entry: `[x1, y1, x2, y2]`, or a list of such.
    unit: "fractions" or "pixels".
    size: of their picture; asked for pixels only.
    where: names the boxes in errors.

  Raises:
    ValueError: what is no box in the picture, or is in another unit.
  """
  boxes = _listed(entry)
  if not boxes and entry != []:
    raise ValueError(
      f"{where} is {shortened(repr(entry), 60)}; give a box (x1, y1, x2, y2), or a list of boxes.")
  _check_width(boxes, unit, where)
  found = checked(_fractions(boxes, size(), where) if unit == "pixels" else boxes, where)
  return tuple(tuple(box) for box in found.tolist())


def picture_in_front(front: str, text: str, num_pictures: int, where: str) -> int:
  """The number of the last picture in front of a place in a text.

  Args:
    front: the text up to that place.
    text: the whole text; without `<image>`, its pictures stand in front.
    num_pictures: of the text.
    where: names the boxes in errors.

  Raises:
    ValueError: there is none.
  """
  number = front.count(IMAGE) if IMAGE in text else num_pictures
  if not 0 < number <= num_pictures:
    raise ValueError(
      f"{where} is in pixels, and no picture stands in front of its phrase; put <image> there, or "
      "give fractions."
    )
  return number - 1


def _check_width(boxes: list, unit: str, where: str) -> None:
  """Each box has the numbers that its unit has."""
  wanted = 2 if unit == "cells" else 4
  for box in boxes:
    if isinstance(box, list) and len(box) != wanted:
      raise ValueError(
        f"{where} has a box of {len(box)} numbers, and in {unit} it has {wanted}; write "
        f"{'the upper left and lower right cell' if wanted == 2 else 'x1, y1, x2, y2'}."
      )


def _listed(entry) -> list:
  """The boxes of a phrase; none for what is no list, which `insert` refuses unless it is None."""
  if not isinstance(entry, list):
    return []
  return entry if all(isinstance(box, list) for box in entry) else [entry]


def _fractions(boxes: list, size: Size, where: str) -> list[list[float]]:
  """Boxes in pixels as fractions of their picture."""
  width, height = size
  found = from_pixels(boxes, width, height)
  for box, fraction in zip(boxes, found):
    if max(box) <= 1:
      raise ValueError(
        f"{where} is {box}, less than a pixel, and looks like fractions; say that they are "
        "fractions."
      )
    if (fraction > 1).any():
      raise ValueError(
        f"{where} is {box}, and its picture has {width} x {height} pixels; give a box that is in "
        "the picture, or cut it."
      )
  return found.tolist()
