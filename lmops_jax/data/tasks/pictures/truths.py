"""Boxes that data sets give in pixels, as fractions of their pictures and as words."""

from __future__ import annotations

import numpy as np

from lmops_jax.data import boxes as boxes_lib
from lmops_jax.data.boxes import Box

_CUT = 1.0  # pixels by which annotators' boxes reach over an edge; they are cut


def fractions(boxes, width: float, height: float, where: str, hint: str) -> tuple[Box, ...]:
  """Boxes in pixels as fractions of their picture.

  What reaches over an edge of the picture by at most a pixel, as rounding makes it, is cut.

  Args:
    boxes: `[N,4]` numbers, (x1, y1, x2, y2) in pixels.
    width, height: of the picture, in pixels.
    where: names file and row in errors.
    hint: what may be wrong with boxes that leave the picture.

  Raises:
    ValueError: a picture without size, or a box that is none in it.
  """
  if not (width > 0 and height > 0):
    raise ValueError(f"{where} has a picture of {width} x {height} pixels; give its real size.")
  found = np.asarray(boxes, np.float64).reshape(-1, 4)
  size = np.array([width, height, width, height], np.float64)
  has_area = (found[:, 2:] > found[:, :2]).all(axis=1)
  inside = ((found >= -_CUT) & (found <= size + _CUT)).all(axis=1)  # never of NaN
  if not (has_area & inside).all():
    i = int(np.argmin(has_area & inside))
    shown = f"{where} has the box ({', '.join(f'{value:g}' for value in found[i])})"
    if not has_area[i]:
      raise ValueError(
        f"{shown}, whose right or bottom edge is not behind the left or top one; expected (x1, y1, "
        "x2, y2) in pixels."
      )
    raise ValueError(
      f"{shown}, which leaves its picture of {width:g} x {height:g} pixels; {hint}.")
  cut = np.clip(boxes_lib.from_pixels(found, width, height), 0, 1)
  return tuple(tuple(box) for box in boxes_lib.checked(cut, where).tolist())


def as_words(boxes: tuple[Box, ...], grid: int) -> str:
  """What stands behind a phrase with these boxes, on a grid of that side."""
  return boxes_lib.words(boxes_lib.encode(boxes, grid), grid)
