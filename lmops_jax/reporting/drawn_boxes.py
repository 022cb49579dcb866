"""Boxes with their names on a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from PIL import ImageColor, ImageDraw, ImageFont

from lmops_jax.data.synthetic_pictures.pictographs import font_file
from lmops_jax.host.words import shortened
from lmops_jax.reporting.plots.style import COLOURS

if TYPE_CHECKING:
  from PIL import Image

  from lmops_jax.data.boxes import Box

_LONGEST_NAME = 40  # characters
_SMALLEST_FONT = 9  # pixels
_Area = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def draw(image: Image.Image, entities: Iterable[tuple[str, Sequence[Box]]]) -> Image.Image:
  """A copy of a picture with boxes in the colours of plots, each name on a ground of its colour.

  A name stands above its box, or where there is room: names do not cover each other as long as the
  picture has place for them.

  Args:
    image: RGB.
    entities: names, each with its boxes in fractions of the picture; one whose corners are in the
      wrong order is drawn between them.
  """
  image = image.convert("RGB")
  canvas, shorter = ImageDraw.Draw(image), min(image.size)
  line = max(1, round(shorter / 160))
  font = ImageFont.truetype(font_file("DejaVuSans"), max(_SMALLEST_FONT, round(shorter / 26)))
  drawn = [
    (shortened(name, _LONGEST_NAME), COLOURS[number % len(COLOURS)], _pixels(box, *image.size))
    for number, (name, boxes) in enumerate(entities) for box in boxes]
  for _, _, (left, top, right, bottom) in drawn:
    area = left - line, top - line, right + line, bottom + line
    canvas.rectangle(area, outline="white", width=3 * line)
  for _, colour, area in drawn:
    canvas.rectangle(area, outline=colour, width=line)
  taken: list[_Area] = []
  for name, colour, area in drawn:  # names last, so that no line crosses them
    left, top, right, bottom = canvas.textbbox((0, 0), name, font=font)
    width, height = right - left + 4 * line, bottom - top + 4 * line
    place = _free_place(area, width, height, image.size, taken)
    taken.append(place)
    canvas.rectangle(place, fill=colour)
    canvas.text(
      (place[0] + 2 * line - left, place[1] + 2 * line - top), name, font=font, fill=_ink(colour))
  return image


def _pixels(box: Box, width: int, height: int) -> _Area:
  """The corners of a box in the picture."""
  (left, right), (top, bottom) = sorted((box[0], box[2])), sorted((box[1], box[3]))
  return left * (width - 1), top * (height - 1), right * (width - 1), bottom * (height - 1)


def _free_place(
  area: _Area, width: float, height: float, size: tuple[int, int], taken: Sequence[_Area]
) -> _Area:
  """Where a name goes: the first place by its box that is in the picture and free."""
  left, top, _, bottom = area
  rows = [top - height, top, bottom - height, bottom]
  rows += [top + k * height for k in range(1, int(size[1] // max(height, 1)))]
  places = []
  for y in rows:
    x = max(0, min(left, size[0] - 1 - width))
    y = max(0, min(y, size[1] - 1 - height))
    places.append((x, y, x + width, y + height))
  return next((place for place in places if not any(_overlap(place, t) for t in taken)), places[0])


def _overlap(a: _Area, b: _Area) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink(colour: str) -> str:
  """Black or white, what is easier to read on a colour (its luma by ITU-R BT.601)."""
  red, green, blue = ImageColor.getrgb(colour)
  return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
