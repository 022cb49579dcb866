"""How far boxes cover each other, and which of many that show the same stay."""

from __future__ import annotations

import numpy as np


def iou(one, other) -> np.ndarray:
  """Intersection over union of boxes (x1, y1, x2, y2).

  A box without area, or with x2 < x1 or y2 < y1, meets nothing.

  Args:
    one, other: `[...,4]` of shapes that broadcast.

  Returns:
    `[...] float64`, 0 to 1.
  """
  one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)

  def area(first, last):
    return np.maximum(last - first, 0).prod(axis=-1)

  shared = area(np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:]))
  union = area(one[..., :2], one[..., 2:]) + area(other[..., :2], other[..., 2:]) - shared
  return np.divide(shared, union, out=np.zeros(np.shape(union)), where=union > 0)


def suppressed(boxes: np.ndarray, max_overlap: float) -> list[int]:
  """Non-maximum suppression.

  Args:
    boxes: `[n,4]`, x1, y1, x2, y2, best first.
    max_overlap: a box goes if its intersection over union with a better one that stays is above.

  Returns:
    The indices of the boxes that stay, ascending.
  """
  kept: list[int] = []
  for i, overlaps in enumerate(iou(boxes[:, None], boxes[None])):
    if not (overlaps[kept] > max_overlap).any():
      kept.append(i)
  return kept
