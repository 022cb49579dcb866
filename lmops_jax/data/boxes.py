"""Boxes in texts: cells of a grid as words, and phrases with their boxes (arXiv:2306.14824).

A box is (x1, y1, x2, y2), fractions of the picture's width and height from its upper left corner.
It is written as two cells of a square grid in reading order, its upper left and lower right one:

    <phrase> a dog</phrase><object><patch_index_0044><patch_index_0863></object>

with `</delimiter_of_multi_objects/>` between the boxes of one phrase. A picture is squashed to the
model's square, so fractions of the picture are fractions of what the model sees.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lmops_jax.host.words import shortened

GRID = 32  # cells in a row and in a column, of the published model
GROUNDING = "<grounding>"
DELIMITER = "</delimiter_of_multi_objects/>"
TAGS = ("<phrase>", "</phrase>", "<object>", "</object>", DELIMITER, GROUNDING)
Rounding = Literal["port", "training"]
Box = tuple[float, float, float, float]

_ROUNDING_ERROR = 1e-6  # of fractions that were computed in float32
_LARGEST_TRAINED = 0.99999  # right and bottom edges in training are cut to this
LARGEST_GRID = 100  # words have four digits
PHRASE = re.compile("<phrase>.+?</phrase>")
_PAIR = r"(?:<patch_index_\d{1,9}>){2}"
_GROUP = re.compile(
  "(?:<phrase>(?P<phrase>[^<]+)</phrase>)?"
  rf"<object>(?P<pairs>{_PAIR}(?:{DELIMITER}{_PAIR})*)</object>")
TAG = re.compile("<.*?>")


class BoxTokens(NamedTuple):
  """Ids of the tokens that boxes are written with.

  Attributes:
    phrase, phrase_end, object, object_end, delimiter: the tags.
    first_location: that of the upper left cell; the others follow in reading order.
  """

  phrase: int
  phrase_end: int
  object: int
  object_end: int
  delimiter: int
  first_location: int


class Entity(NamedTuple):
  """What a text locates.

  Attributes:
    name: the phrase; of a box without one, its two location words with numbers as they are.
    start, end: where the name is in the clean text; equal for a box without phrase. Such a box may
      lie outside of it, among blanks that are cut from the text's ends: its place is then negative
      or behind the end, as in transformers, and whoever cuts the text there takes the nearest end.
    boxes: in the order of the text.
  """

  name: str
  start: int
  end: int
  boxes: tuple[Box, ...]


class Grounded(NamedTuple):
  """A text without its tags, and what it locates.

  Attributes:
    text: the clean text.
    entities: in the order of the text.
    num_malformed: `<object>` tags that begin no group of boxes, or one with a cell outside of the
      grid; they give no entity.
  """

  text: str
  entities: tuple[Entity, ...]
  num_malformed: int = 0


def location_word(index: int) -> str:
  """The word of a cell, `<patch_index_0044>` of cell 44."""
  return f"<patch_index_{index:04d}>"


def grounding_words(grid: int = GRID) -> tuple[str, ...]:
  """The words that a vocabulary needs for boxes: the tags, then the cells.

  Behind `image_tokens.KOSMOS_WORDS` they have the published model's ids.
  """
  _check_grid(grid)
  return (*TAGS, *map(location_word, range(grid * grid)))


def box_tokens(token_id: Callable[[str], int | None]) -> tuple[BoxTokens, int]:
  """The ids of a vocabulary's words for boxes, and the side of its grid.

  Args:
    token_id: `word -> id`, None for a word that the vocabulary lacks (`Tokenizer.token_id`).

  Raises:
    ValueError: a tag is missing, or the words of cells are not those of a square grid in order.
  """
  ids = {tag: token_id(tag) for tag in TAGS}
  missing = [tag for tag, found in ids.items() if found is None]
  if missing:
    raise ValueError(
      f"the vocabulary has no word {missing[0]}, which texts with boxes need; take a model that "
      "was trained with boxes, such as Kosmos-2."
    )
  every = map(token_id, map(location_word, range(LARGEST_GRID**2)))
  locations = list(itertools.takewhile(lambda found: found is not None, every))
  side = math.isqrt(len(locations))
  if not locations or side * side != len(locations) or (np.diff(locations) != 1).any():
    raise ValueError(
      f"the vocabulary has {len(locations)} words of cells from {location_word(0)} on; they should "
      f"be those of a square grid, {GRID * GRID} of Kosmos-2, with ids in order."
    )
  return BoxTokens(*(ids[tag] for tag in TAGS[:-1]), locations[0]), side


def checked(boxes, where: str = "boxes") -> np.ndarray:
  """Boxes as an array, held against what fractions can be.

  Args:
    boxes: `[N,4]` numbers, (x1, y1, x2, y2) in fractions of the picture.
    where: names them in errors.

  Returns:
    `[N,4] float64`; what is outside of [0, 1] by a rounding error is moved to its end.

  Raises:
    ValueError: another shape, no number, or a box that is none in the picture; names it by its
      index.
  """
  found = _rows(boxes, 4, where).astype(np.float64)
  inside = np.clip(found, 0, 1)
  sound = (np.abs(found - inside) <= _ROUNDING_ERROR).all(axis=1)  # never of NaN
  sound &= (inside[:, 2:] > inside[:, :2]).all(axis=1)
  if not sound.all():
    i = int(np.argmin(sound))
    raise ValueError(f"{where}: box {i} is {_shown(found[i])}, {_fault(found[i])}.")
  return inside


def _fault(box: np.ndarray) -> str:
  """What is wrong with a box that is not sound, and what to do."""
  if not np.isfinite(box).all():
    return "which is not finite; give four fractions of the picture"
  if (box > 2).any():
    return (
      "which looks like pixels; divide by the picture's width and height (boxes.from_pixels), or "
      "say that they are pixels")
  if (box < -_ROUNDING_ERROR).any() or (box > 1 + _ROUNDING_ERROR).any():
    return "which is not all in the picture; give fractions between 0 and 1, or cut the box"
  return (
    "whose right or bottom edge is not behind the left or top one; give (x1, y1, x2, y2), and turn "
    "(x, y, width, height) into that first (boxes.from_corner_and_size)")


def from_pixels(boxes, width: float, height: float) -> np.ndarray:
  """Boxes in pixels of a picture as fractions of it.

  Args:
    boxes: `[N,4]`, (x1, y1, x2, y2) in pixels.
    width, height: of the picture.

  Returns:
    `[N,4] float64`, not checked yet.

  Raises:
    ValueError: another shape, no number, or a picture without size.
  """
  if not (width > 0 and height > 0):
    raise ValueError(f"a picture of {width} x {height} pixels has no boxes; give its real size.")
  return _rows(boxes, 4, "boxes") / np.array([width, height, width, height], np.float64)


def from_corner_and_size(boxes) -> np.ndarray:
  """Boxes as (x, y, width, height), which COCO writes, as `[N,4] float64` (x1, y1, x2, y2).

  Raises:
    ValueError: another shape, or no number.
  """
  found = _rows(boxes, 4, "boxes").astype(np.float64)
  return np.concatenate([found[:, :2], found[:, :2] + found[:, 2:]], axis=1)


def encode(
  boxes, grid: int = GRID, rule: Rounding = "port", where: str = "boxes"
) -> np.ndarray:
  """The upper left and lower right cells of boxes.

  Args:
    boxes: `[N,4]` numbers, fractions of the picture.
    grid: cells in a row and in a column.
    rule: where a right or bottom edge that lies exactly between two cells belongs: "port", to the
      cell in front of it, as in the published model's processor; "training", to the cell behind
      it, as in its training.
    where: names the boxes in errors.

  Returns:
    `[N,2] int32`.

  Raises:
    ValueError: as `checked`, or another rule or grid.
  """
  _check_grid(grid)
  found = checked(boxes, where)
  first = np.floor(_places(found[:, :2], grid))
  if rule == "port":
    last = np.ceil(_places(found[:, 2:], grid)) - 1
  elif rule == "training":
    last = np.floor(_places(np.minimum(found[:, 2:], _LARGEST_TRAINED), grid))
  else:
    raise ValueError(f"the rule of rounding {rule!r} is unknown; take port or training.")
  first = np.minimum(first, grid - 1)
  last = np.maximum(last, first)
  return np.stack([first, last], axis=1).astype(np.int32) @ np.array([1, grid], np.int32)


def _places(fractions: np.ndarray, grid: int) -> np.ndarray:
  """Fractions in cells. A grid that is no power of 2 rounds, so edges k / grid are found again."""
  places = grid * fractions
  if grid & (grid - 1) == 0:
    return places
  edges = np.round(places)
  return np.where(np.abs(places - edges) < 1e-9, edges, places)


def decode(indices, grid: int = GRID) -> np.ndarray:
  """The boxes of pairs of cells.

  A box in one row, one column or one cell reaches to the outer edges of its cells, any other one
  from centre to centre. A lower right cell above or to the left of the first gives a box of which
  x2 < x1 or y2 < y1: a model may say so.

  Args:
    indices: `[N,2]` whole numbers, upper left and lower right cell.
    grid: cells in a row and in a column.

  Returns:
    `[N,4] float64`, fractions of the picture.

  Raises:
    ValueError: another shape, no whole number, a cell outside of the grid, or another grid.
  """
  first, last = _corners(_cells(indices, grid, "indices"), grid)
  to_edges = (first == last).any(axis=1, keepdims=True)
  begin = first + np.where(to_edges, 0, 0.5)
  end = last + np.where(to_edges, 1, 0.5)
  return np.concatenate([begin, end], axis=1) / grid


def words(indices, grid: int = GRID) -> str:
  """`<object>`, the words of pairs of cells, and `</object>`: what stands behind a phrase.

  Args:
    indices: `[N,2]` whole numbers, at least one pair.
    grid: cells in a row and in a column.

  Raises:
    ValueError: as `decode`, no pair, or a lower right cell above or to the left of the first.
  """
  cells = _cells(indices, grid, "indices")
  if not len(cells):
    raise ValueError("there is no box to write; leave <object> and </object> out.")
  first, last = _corners(cells, grid)
  if (last < first).any():
    wrong = cells[np.argmax((last < first).any(axis=1))].tolist()
    raise ValueError(
      f"the lower right cell {wrong[1]} is above or to the left of the upper left one {wrong[0]}; "
      "give the upper left cell first."
    )
  pairs = (location_word(a) + location_word(b) for a, b in cells.tolist())
  return f"<object>{DELIMITER.join(pairs)}</object>"


def insert(
  text: str, boxes: Sequence[Any] | None, grid: int = GRID, rule: Rounding = "port",
  where: str = "boxes",
) -> str:
  """A text with boxes behind its phrases.

  Args:
    text: with `<phrase>`...`</phrase>` around what has boxes; an empty phrase, or one with the end
      of a line in it, is none.
    boxes: for each phrase, in order: None, a box, or several boxes. A box is four fractions, or
      two cells. None or nothing at all: the text stays.
    grid, rule: as in `encode`.
    where: names the boxes in errors.

  Raises:
    ValueError: not one entry for each phrase, or a box that is none.
  """
  if boxes is None or not len(boxes):
    return text
  ends = [match.end() for match in PHRASE.finditer(text)]
  if len(ends) != len(boxes):
    raise ValueError(
      f"{where} has {len(boxes)} entries and the text {len(ends)} phrases <phrase>...</phrase>; "
      "give one entry for each phrase, null or None for one without box."
    )
  groups = [_group(entry, grid, rule, f"{where}[{i}]") for i, entry in enumerate(boxes)]
  starts = [0, *ends]
  pieces = [text[start:end] + group for start, end, group in zip(starts, ends, groups)]
  return "".join(pieces) + text[ends[-1] :]


def _group(entry, grid: int, rule: Rounding, where: str) -> str:
  """The words of a phrase's boxes, "" for none."""
  if entry is None or (_is_listed(entry) and not len(entry)):
    return ""
  several = _is_listed(entry) and all(box is None or _is_listed(box) for box in entry)
  cells = []
  for number, box in enumerate(entry if several else [entry]):
    place = f"{where}[{number}]" if several else where
    if not _is_listed(box) or len(box) not in (2, 4):
      raise ValueError(
        f"{place} is {shortened(repr(box), 60)}; a box is four fractions (x1, y1, x2, y2) or two "
        "cells of the grid."
      )
    row = _cells([box], grid, place) if len(box) == 2 else encode([box], grid, rule, place)
    cells.extend(row.tolist())
  return words(cells, grid)


def _is_listed(value) -> bool:
  return isinstance(value, (list, tuple, np.ndarray))


def extract(text: str, grid: int = GRID) -> Grounded:
  """What a generated text says without its tags, and what it locates.

  A group of boxes counts if its tags follow each other with nothing between; a phrase belongs to
  the group right behind it. Of everything else no entity is made. All of `<...>` is taken as a
  tag and left out of the clean text, also what a caption means literally.

  Args:
    text: with special tokens as words; what stands up to the last `</image>` is left out.
    grid: cells in a row and in a column.

  Raises:
    ValueError: another grid.
  """
  _check_grid(grid)
  text = text.rpartition("</image>")[2]
  untagged = TAG.sub("", text)
  leading = len(untagged) - len(untagged.lstrip())
  entities, num_malformed = [], text.count("<object>")
  for match in _GROUP.finditer(text):
    cells = [int(digits) for digits in re.findall(r"\d+", match["pairs"])]
    if max(cells) >= grid * grid:
      continue
    num_malformed -= 1
    pairs = list(zip(cells[::2], cells[1::2]))
    boxes = [tuple(box) for box in decode(pairs, grid).tolist()]
    if match["phrase"] is None:
      place = len(TAG.sub("", text[: match.start()])) - leading
      entities += [
        Entity(f"<patch_index_{a}><patch_index_{b}>", place, place, (box,))
        for (a, b), box in zip(pairs, boxes)]
      continue
    phrase = match["phrase"]
    start, end = (len(TAG.sub("", text[:at])) - leading for at in match.span("phrase"))
    start += len(phrase) - len(phrase.lstrip())
    end -= len(phrase) - len(phrase.rstrip())
    entities.append(Entity(phrase.strip(), start, end, tuple(boxes)))
  return Grounded(untagged.strip(), tuple(entities), num_malformed)


def _rows(values, width: int, where: str) -> np.ndarray:
  """`[N,width]` numbers, of which none is a truth value."""
  try:
    found = np.asarray(values)
  except ValueError:  # rows of different lengths
    found = np.empty(0, object)
  listed = [] if isinstance(values, np.ndarray) else values
  truths = found.dtype == bool or any(
    isinstance(x, (bool, np.bool_)) for row in listed if _is_listed(row) for x in row)
  if found.shape == (0,) and found.dtype != object:
    return np.zeros((0, width), np.int64)
  if truths or found.ndim != 2 or found.shape[1] != width or found.dtype.kind not in "iuf":
    raise ValueError(
      f"{where} is {shortened(repr(values), 60)}; give rows of {width} numbers each."
    )
  return found


def _cells(indices, grid: int, where: str) -> np.ndarray:
  """`[N,2] int64` cells of the grid."""
  _check_grid(grid)
  found = _rows(indices, 2, where)
  outside = (found < 0) | (found >= grid * grid)
  if found.dtype.kind == "f" or outside.any():
    value = found[outside][0] if outside.any() else found.flat[0]
    raise ValueError(
      f"{where} holds {value}; a cell is a whole number from 0 to {grid * grid - 1}, and a box in "
      "fractions has four numbers."
    )
  return found.astype(np.int64)


def _corners(cells: np.ndarray, grid: int) -> tuple[np.ndarray, np.ndarray]:
  """`[N,2]` column and row of the upper left cells, and of the lower right ones."""
  column_row = np.stack([cells % grid, cells // grid], axis=-1)
  return column_row[:, 0], column_row[:, 1]


def _check_grid(grid: int) -> None:
  if type(grid) is not int or not 1 <= grid <= LARGEST_GRID:
    raise ValueError(
      f"the grid of boxes has the side {grid!r}; give a whole number from 1 to {LARGEST_GRID}."
    )


def _shown(box: np.ndarray) -> str:
  return f"({', '.join(f'{value:g}' for value in box)})"
