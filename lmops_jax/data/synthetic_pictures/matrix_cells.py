"""The pictures of matrices: a shape of some size and shade, perhaps in a frame, on white."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

FRAMES = ("no frame", "circle", "square", "diamond")
SHAPES = ("triangle", "square", "circle", "star", "cross")
LEVELS = 5  # of size and of shade
_SUPERSAMPLING = 4
_RADII = (0.10, 0.15, 0.20, 0.25, 0.30)  # of the shape's circumscribed circle, of the side
_SHADES = (255, 200, 145, 85, 0)
_FRAME_RADIUS, _LINE = 0.46, 0.035
_CORNERS = {"triangle": 3, "square": 4, "star": 5}


class Cell(NamedTuple):
  """What one picture of a matrix shows, each attribute by the number of its value.

  Attributes:
    shape: of `SHAPES`. frame: of `FRAMES`.
    size: 0 to 4, small to large. shade: 0 to 4, white to black.
  """

  shape: int
  frame: int
  size: int
  shade: int


ATTRIBUTES = Cell._fields
ORDERED = ("size", "shade")  # whose values have an order
NUM_VALUES = {"shape": len(SHAPES), "frame": len(FRAMES), "size": LEVELS, "shade": LEVELS}


@functools.cache
def draw_cell(cell: Cell, side: int) -> np.ndarray:
  """The picture of a cell, `[side,side,3] uint8`, read only."""
  whole = side * _SUPERSAMPLING
  image = Image.new("L", (whole, whole), 255)
  draw = ImageDraw.Draw(image)
  line = max(1, round(_LINE * whole))
  _draw_frame(draw, FRAMES[cell.frame], whole, line)
  _draw_shape(draw, SHAPES[cell.shape], _RADII[cell.size] * whole, _SHADES[cell.shade], whole, line)
  grey = np.asarray(image.resize((side, side), Image.Resampling.BOX))
  picture = np.repeat(grey[..., None], 3, axis=-1)
  picture.setflags(write=False)
  return picture


def _draw_frame(draw, frame: str, whole: int, line: int) -> None:
  radius = _FRAME_RADIUS * whole
  if frame == "circle":
    draw.ellipse(_around(whole, radius), outline=0, width=line)
  elif frame == "square":
    draw.rectangle(_around(whole, radius), outline=0, width=line)
  elif frame == "diamond":
    _outlined(draw, _polygon(4, radius, whole, turn=0.0), 255, line)


def _draw_shape(draw, shape: str, radius: float, fill: int, whole: int, line: int) -> None:
  if shape == "circle":
    draw.ellipse(_around(whole, radius), fill=fill, outline=0, width=line)
  elif shape == "cross":
    arm, middle = radius / 3, whole / 2
    corners = [(arm, radius), (arm, arm), (radius, arm)]
    corners += [(x, -y) for x, y in reversed(corners)]
    corners += [(-x, y) for x, y in reversed(corners)]
    _outlined(draw, [(middle + x, middle + y) for x, y in corners], fill, line)
  else:
    turn = 0.125 if shape == "square" else 0.0
    inner = 0.42 if shape == "star" else None
    _outlined(draw, _polygon(_CORNERS[shape], radius, whole, turn, inner), fill, line)


def _around(whole: int, radius: float) -> tuple[float, float, float, float]:
  return whole / 2 - radius, whole / 2 - radius, whole / 2 + radius, whole / 2 + radius


def _polygon(corners: int, radius: float, whole: int, turn: float, inner: float | None = None):
  """Corners of a regular polygon, the first at the top, turned by parts of a circle; of a star, if
  `inner` tells its inner radius as a share of the outer."""
  radii = ([radius] if inner is None else [radius, inner * radius]) * corners
  angles = [2 * math.pi * (i / len(radii) + turn) for i in range(len(radii))]
  middle = whole / 2
  return [(middle + r * math.sin(a), middle - r * math.cos(a)) for r, a in zip(radii, angles)]


def _outlined(draw, corners, fill: int, line: int) -> None:
  draw.polygon(corners, fill=fill)
  draw.line([*corners, corners[0], corners[1]], fill=0, width=line, joint="curve")
