"""Reads pictographs off the pixels of a scene, as the eye does: by colour, then by outline."""

import numpy as np

from lmops_jax.data.synthetic_pictures.pictographs import COLORS, RGB, SHAPES, mask


def ink_of(picture, color):
  """Where a picture has nearly the pure colour, which no background has, `[h,w] bool`."""
  return np.abs(picture.astype(int) - RGB[color]).max(axis=-1) < 30


def recognised(picture):
  """(shape, colour, (left, top, right, bottom) in pixels) of each colour that is there."""
  found = []
  for color in COLORS:
    ink = ink_of(picture, color)
    if ink.sum() < ink.size // 200:
      continue
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    part = ink[top:bottom, left:right]

    def distance(shape, part=part):
      drawn = mask(shape, max(part.shape)) > 127
      height, width = np.maximum(drawn.shape, part.shape)
      one, other = (
        np.pad(m, ((0, height - m.shape[0]), (0, width - m.shape[1]))) for m in (drawn, part))
      return (one != other).mean()

    found.append((min(SHAPES, key=distance), color, (left, top, right, bottom)))
  return found
