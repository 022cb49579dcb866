"""Eight shapes, which Matplotlib's DejaVu fonts draw, in eight colours."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

_CHARACTERS = {
  "star": "★", "heart": "♥", "cross": "✚", "cloud": "☁", "horse": "♞", "flag": "⚑", "arrow": "➔",
  "flower": "✿",
}
SHAPES = tuple(_CHARACTERS)
RGB = {
  "red": (205, 25, 30), "orange": (250, 130, 10), "yellow": (250, 230, 30),
  "green": (20, 150, 50), "blue": (25, 70, 225), "purple": (130, 30, 170),
  "white": (252, 252, 252), "black": (8, 8, 8),
}
COLORS = tuple(RGB)
_DRAWN_PIXELS = 160  # of the font, before a mask is made small


def font_file(name: str) -> Path:
  """A TrueType font that comes with Matplotlib, such as "DejaVuSans".

  Raises:
    ValueError: there is no such font.
  """
  import matplotlib

  folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
  path = folder / f"{name}.ttf"
  if not path.is_file():
    raise ValueError(
      f"the font {name!r} is not among those of Matplotlib in {folder}; install Matplotlib from "
      "PyPI, with its fonts, or name another."
    )
  return path


@functools.cache
def mask(shape: str, side: int) -> np.ndarray:
  """How much of each pixel a shape covers, `[height,width] uint8`, 255 is all of it.

  Args:
    shape: one of `SHAPES`.
    side: height or width in pixels, whichever is larger.
  """
  ink = _ink(shape)
  scale = side / max(ink.size)
  width, height = (max(1, round(scale * length)) for length in ink.size)
  small = np.array(ink.resize((width, height), Image.Resampling.BOX))
  small.setflags(write=False)
  return small


@functools.cache
def _ink(shape: str) -> Image.Image:
  font = ImageFont.truetype(font_file("DejaVuSans"), _DRAWN_PIXELS)
  drawn = font.getmask(_CHARACTERS[shape], mode="L")
  whole = Image.frombytes("L", drawn.size, bytes(drawn))
  return whole.crop(whole.getbbox())


def paste(picture: np.ndarray, shape: str, color: str, top: int, left: int, side: int) -> None:
  """Draws a pictograph into a picture `[h,w,3] uint8`, in place."""
  cover = mask(shape, side)
  height, width = cover.shape
  part = picture[top : top + height, left : left + width]
  alpha = cover[..., None].astype(np.uint16)
  ink = np.array(RGB[color], np.uint16)
  part[:] = (alpha * ink + (255 - alpha) * part + 127) // 255
